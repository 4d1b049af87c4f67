//! Writes every case of the testkit into a directory, with `expected.json`.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1) else {
        eprintln!("usage: make-exhibits DIR");
        return ExitCode::from(2);
    };
    match write_all(Path::new(&dir)) {
        Ok(count) => {
            println!("{count} exhibits in {}", dir.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("make-exhibits: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the cases; gives back their number. A directory that is there already is refused.
fn write_all(dir: &Path) -> Result<usize, Box<dyn Error + Send + Sync>> {
    fs::create_dir(dir)?;
    let cases = testkit::cases::all()?;
    let mut expected = Vec::new();
    for case in &cases {
        let place = dir.join(case.name);
        fs::create_dir(&place)?;
        for (name, bytes) in &case.exhibit.files {
            fs::write(place.join(name), bytes.as_slice())?;
        }
        expected.push(serde_json::json!({
            "name": case.name,
            "why": case.why,
            "exit": case.expected.exit,
            "files": case.expected.files,
            "blocks": case.expected.blocks,
        }));
    }
    let text = serde_json::to_string_pretty(&expected)?;
    fs::write(dir.join("expected.json"), format!("{text}\n"))?;
    Ok(cases.len())
}
