//! A program of the lab's that runs in a Linux guest: it says a line of JSON when it is ready, and one
//! for each word that it finds in a file.

use std::time::Duration;

use serde_json::Value;

use crate::error::{Doing, Result, failed};
use crate::guest::Guest;

/// Starts `/bin/NAME ARGS` in a directory of its own, after the shell lines `before`; what it says
/// when it is ready.
pub(crate) fn start(
    guest: &mut Guest,
    name: &str,
    args: &str,
    before: &str,
    patience: Duration,
) -> Result<Value> {
    let script = format!(
        "set -e; rm -rf /tmp/{name}; mkdir /tmp/{name}; cd /tmp/{name}
        quiet() {{ [ ! -e $2 ] || echo $1 > $2; }}
        quiet 0 /proc/sys/vm/compact_unevictable_allowed
        {before}
        /bin/{name} {args} command=/tmp/{name}/command > said 2>&1 &
        while [ ! -s said ] && kill -0 $!; do usleep 20000; done; cat said; kill -0 $!"
    );
    let said = guest.sh_within(&script, patience)?;
    let armed: Value = serde_json::from_str(said.trim()).doing(format_args!("{said:?}"))?;
    match armed["armed"] == true {
        true => Ok(armed),
        false => Err(failed(format_args!("{name} said {armed}"))),
    }
}

/// What it says to `word`: `report`, or `end`, after which it ends.
pub(crate) fn ask(guest: &mut Guest, name: &str, word: &str) -> Result<Value> {
    let said = guest.sh(&format!(
        "set -e; cd /tmp/{name}; lines=$(wc -l < said); echo {word} > new; mv new command
        while [ $(wc -l < said) = $lines ] && pidof {name} > /dev/null; do usleep 20000; done
        [ $(wc -l < said) -gt $lines ]; tail -n 1 said"
    ))?;
    serde_json::from_str(said.trim()).doing(format_args!("{said:?}"))
}
