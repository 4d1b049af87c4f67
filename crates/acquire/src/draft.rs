//! The exhibit's name, made from the VM's: which is the guest owner's text, and not to be trusted.

/// Longest part of a VM's name that goes into the exhibit's name, in bytes.
const NAME_MAX: usize = 64;

/// The exhibit's name: Unicode letters, digits, `.`, `_` and `-` of the VM's name (others become
/// `_`), the time in UTC, four digits of the record's id.
///
/// `utc` is RFC 3339; its punctuation and fraction are left out.
pub fn name(vm: &str, utc: &str, record_id: &str) -> String {
    let mut name = String::new();
    for c in vm.chars() {
        let c = if c.is_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
        if name.len() + c.len_utf8() > NAME_MAX {
            break;
        }
        name.push(c);
    }
    // A name that begins with a dot is hidden, one that begins with a hyphen looks like a flag.
    if name.is_empty() {
        name.push('_');
    } else if name.starts_with(['.', '-']) {
        name.replace_range(..1, "_");
    }
    let seconds = utc.split('.').next().unwrap_or(utc);
    let time: String = seconds.chars().filter(|c| c.is_ascii_digit() || *c == 'T').collect();
    let id = record_id.get(..4).unwrap_or(record_id);
    format!("{name}-{time}Z-{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(vm: &str, expected: &str) {
        let name = name(vm, "2026-11-22T21:30:00.123456789Z", "3f2ad7c0-0000");
        assert_eq!(name, format!("{expected}-20261122T213000Z-3f2a"));
    }

    #[test]
    fn a_vms_name_cannot_leave_the_directory() {
        check("web-07", "web-07");
        check("../../x <script>", "_._.._x__script_");
        check("веб сервер", "веб_сервер");
        check("", "_");
        check("-rf", "_rf");
        check(&"я".repeat(100), &"я".repeat(32));
    }
}
