//! What was recorded of real machines: `tests/WHAT/VERSION/MACHINE/`.

use std::path::{Path, PathBuf};

fn children(dir: &Path) -> Vec<PathBuf> {
    let mut list: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    list.sort();
    list
}

/// The directories of all machines under `tests/WHAT`, each named `VERSION-MACHINE`.
pub(crate) fn machines(what: &str) -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(what);
    let versions = children(&root).into_iter().filter(|path| path.is_dir());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    versions
        .flat_map(|version| {
            let machines = children(&version).into_iter();
            machines.map(move |dir| (format!("{}-{}", name(&version), name(&dir)), dir))
        })
        .collect()
}
