//! What the host says of a process: its command line and its mappings.

use host::maps::{parse_maps, parse_smaps};
use qemu::cmdline::{Endpoint, is_qemu_exe, parse};
use std::os::unix::ffi::OsStrExt;

/// A command line with NULs between the words, as in `/proc/PID/cmdline`.
pub fn cmdline(data: &[u8]) {
    let argv: Vec<Vec<u8>> = data.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect();
    let _ = is_qemu_exe(argv.first().map_or(data, Vec::as_slice));
    let line = parse(&argv);
    assert!(line.monitors.len() < argv.len(), "a monitor is made by an option");
    assert!(line.memory_bytes.is_none_or(|bytes| bytes > 0 && bytes.is_multiple_of(8192)));
    quoted(argv.last().map_or(data, Vec::as_slice));
}

/// A name and a path with their commas doubled come back as they are.
fn quoted(text: &[u8]) {
    let twice = |byte: &u8| vec![*byte; if *byte == b',' { 2 } else { 1 }];
    let doubled: Vec<u8> = text.iter().flat_map(twice).collect();
    let word = |front: &[u8], behind: &[u8]| [front, &doubled, behind].concat();
    let argv: [&[u8]; 5] = [
        b"qemu",
        b"-name",
        &word(b"guest=", b",debug-threads=on"),
        b"--qmp",
        &word(b"unix:path=", b",server=on"),
    ];
    let line = parse(&argv.map(<[u8]>::to_vec));
    assert_eq!(line.name.as_deref(), Some(&*String::from_utf8_lossy(text)));
    let path = line.qmp().next();
    assert!(matches!(path, Some(Endpoint::Path(path)) if path.as_os_str().as_bytes() == text));
}

/// Command lines as a user, libvirt and Proxmox write them.
pub fn cmdline_seeds() -> Vec<Vec<u8>> {
    let lines = [
        "qemu-system-x86_64 -name a,,b -m 512 -enable-kvm -qmp unix:/run/a.qmp,server=on,wait=off -monitor stdio",
        "/usr/bin/kvm -id 100 -name web,debug-threads=on -chardev socket,id=qmp,path=/run/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control -m size=1.5G,slots=4 -machine pc,accel=kvm:tcg,confidential-guest-support=sev0 -object sev-guest,id=sev0",
        r#"qemu-kvm -name guest=x -uuid 1D0C3A52 -object {"qom-type":"memory-backend-ram","id":"m"} -machine q35,memory-backend=m -chardev {"id":"c","backend":{"type":"socket","data":{"addr":{"type":"unix","data":{"path":"/a","abstract":true}},"server":true}}} -mon chardev=c,mode=control -accel tcg -readconfig f"#,
        "kvm -chardev socket,id=m,fd=22,server=on -mon m -monitor none -qmp chardev:m -qmp tcp:localhost:4444 -M none",
    ];
    lines.iter().map(|line| line.replace(' ', "\0").into_bytes()).collect()
}

/// `maps`, and the same bytes as `smaps`.
pub fn maps(data: &[u8]) {
    if let Ok(vmas) = parse_maps(data) {
        for pair in vmas.windows(2) {
            assert!(pair[0].end <= pair[1].start, "mappings are ascending and apart");
        }
        // Printing replaces what is not UTF-8.
        if vmas.iter().all(|vma| str::from_utf8(&vma.path).is_ok()) {
            let text: String = vmas.iter().map(|vma| format!("{vma}\n")).collect();
            assert_eq!(parse_maps(text.as_bytes()).ok(), Some(vmas));
        }
    }
    if let Ok(all) = parse_smaps(data, |_| true) {
        assert!(all.iter().all(|entry| entry.page_size.is_power_of_two()));
        let wanted = |start: u64| start.is_multiple_of(8192);
        let some = parse_smaps(data, |vma| wanted(vma.start)).expect("it was read before");
        let picked: Vec<_> = all.into_iter().filter(|entry| wanted(entry.vma.start)).collect();
        assert_eq!(some, picked, "an entry does not depend on the others");
    }
}

/// A few lines of each file.
pub fn maps_seeds() -> Vec<Vec<u8>> {
    let maps = "\
55d0c8a00000-55d0c8a02000 r--p 00000000 fe:00 247030                     /usr/bin/a b (deleted)
7f0000000000-7f0080000000 rw-p 00000000 00:00 0 
7f0080000000-7f00c0000000 rw-s 40000000 00:01 1031                       /memfd:pc.ram (deleted)
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";
    let smaps = "\
1000-3000 rw-p 00000000 00:00 0 
Size:                  8 kB
KernelPageSize:        4 kB
Rss:                   4 kB
Swap:                 12 kB
VmFlags: rd wr mr mg 
200000-400000 rw-s 00000000 00:0f 7   /dev/hugepages/x
KernelPageSize:     2048 kB
Rss:                   0 kB
Swap:                  0 kB
VmFlags: rd wr sh ht 
";
    vec![maps.into(), smaps.into()]
}
