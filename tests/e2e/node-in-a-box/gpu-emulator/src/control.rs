//! The control socket: text lines in, text lines out. It kills and revives devices while virtual machines use them.
//!
//! ```text
//! list             one line "NAME alive" or "NAME dead" for each device, then "ok"
//! kill NAME        the device falls off the bus: every read gives ones, writes and resets do nothing
//! revive NAME      it is back, as it was
//! ```
//!
//! Each answer ends with a line `ok`, or is one line `error: REASON`.

use std::collections::BTreeMap;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use crate::device::Life;
use crate::journal::{Event, Journal};

/// A client that says nothing for this long is left, so that the next one gets its turn.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes that one connection may send.
const MAX_BYTES: u64 = 64 << 10;

/// Answers on the socket for ever, one client at a time.
///
/// # Errors
/// When the socket takes no more clients.
pub fn serve(
    listener: &UnixListener,
    lives: &BTreeMap<String, Life>,
    journal: &Journal,
) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept()?;
        // A client that went away is its own affair.
        let _left = converse(&stream, lives, journal);
    }
}

fn converse(
    stream: &UnixStream,
    lives: &BTreeMap<String, Life>,
    journal: &Journal,
) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut out = stream;
    for line in BufReader::new(stream.take(MAX_BYTES)).lines() {
        let answer = match obey(&line?, lives, journal) {
            Ok(lines) => lines + "ok\n",
            Err(reason) => format!("error: {reason}\n"),
        };
        out.write_all(answer.as_bytes())?;
    }
    Ok(())
}

/// Does what one line says, and gives the lines of the answer before `ok`.
fn obey(line: &str, lives: &BTreeMap<String, Life>, journal: &Journal) -> Result<String, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let dead = match words[..] {
        ["list"] => return Ok(list(lives)),
        ["kill", _] => true,
        ["revive", _] => false,
        _ => return Err(format!("{line:?} is none of: list, kill NAME, revive NAME")),
    };
    let name = words[1];
    let life = lives
        .get(name)
        .ok_or_else(|| format!("there is no device {name:?}"))?;
    life.set_dead(dead);
    journal.note(name, Event::Dead { dead });
    Ok(String::new())
}

fn list(lives: &BTreeMap<String, Life>) -> String {
    let state = |life: &Life| if life.is_dead() { "dead" } else { "alive" };
    lives
        .iter()
        .map(|(name, life)| format!("{name} {}\n", state(life)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_kill_revive_and_list() {
        let journal = Journal::new(io::sink());
        let lives = BTreeMap::from([("gpu0".to_owned(), Life::new(false))]);
        let obey = |line: &str| obey(line, &lives, &journal);
        assert_eq!(obey("list"), Ok("gpu0 alive\n".to_owned()));
        assert_eq!(obey("kill gpu0"), Ok(String::new()));
        assert_eq!(obey("list"), Ok("gpu0 dead\n".to_owned()));
        assert_eq!(obey("revive gpu0"), Ok(String::new()));
        assert!(!lives["gpu0"].is_dead());
        for wrong in [
            "",
            "kill",
            "kill gpu1",
            "kill gpu0 gpu0",
            "KILL gpu0",
            "die",
        ] {
            assert!(obey(wrong).is_err(), "{wrong:?}");
        }
    }
}
