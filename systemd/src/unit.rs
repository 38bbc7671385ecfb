//! What systemd knows of one unit, as plain data.

use std::fmt;
use std::path::PathBuf;

/// A unit's state, as org.freedesktop.systemd1(5) describes the properties of the same names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnitState {
    /// The unit's own name; not the alias that it was asked for by.
    pub name: String,
    /// `loaded`, `masked`, `bad-setting`, ...
    pub load_state: String,
    /// `active`, `reloading`, `inactive`, `failed`, `activating` or `deactivating`.
    pub active_state: String,
    /// A finer word, for a service for example `running`, `dead`, `failed` or `auto-restart`.
    pub sub_state: String,
    /// The main process, when one runs. A service's only.
    pub main_pid: Option<u32>,
    /// Why the service's last run ended: `success`, `exit-code`, `signal`, `timeout`, `protocol`, `start-limit-hit`, ...
    /// Empty for units that are not services.
    pub result: String,
    /// How the last main process ended, once it did. A service's only.
    pub main_exit: Option<MainExit>,
    /// The unit file, as the host sees it; none for a unit that was made on the fly.
    pub fragment_path: Option<PathBuf>,
}

/// How a service's main process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MainExit {
    /// It exited with this status.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
}

impl UnitState {
    /// Whether the unit is up.
    pub fn is_active(&self) -> bool {
        matches!(self.active_state.as_str(), "active" | "reloading")
    }
}

impl fmt::Display for UnitState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.active_state, self.sub_state)?;
        if !self.result.is_empty() && self.result != "success" {
            write!(f, ", result {}", self.result)?;
        }
        match self.main_exit {
            Some(MainExit::Exited(status)) => {
                write!(f, ", its main process exited with status {status}")
            }
            Some(MainExit::Killed(signal)) => {
                write!(f, ", its main process was killed by signal {signal}")
            }
            None => Ok(()),
        }
    }
}

impl MainExit {
    /// From `ExecMainCode` and `ExecMainStatus`: the `si_code` and `si_status` of waitid(2), zero while it runs.
    pub(crate) fn from_properties(code: i32, status: i32) -> Option<MainExit> {
        match code {
            1 => Some(MainExit::Exited(status)),
            // CLD_KILLED and CLD_DUMPED.
            2 | 3 => Some(MainExit::Killed(status)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_reads_like_a_sentence() {
        let mut state = UnitState {
            active_state: "active".to_owned(),
            sub_state: "running".to_owned(),
            result: "success".to_owned(),
            ..UnitState::default()
        };
        assert_eq!(state.to_string(), "active (running)");
        assert!(state.is_active());
        state.active_state = "failed".to_owned();
        state.sub_state = "failed".to_owned();
        state.result = "exit-code".to_owned();
        state.main_exit = MainExit::from_properties(1, 2);
        assert_eq!(
            state.to_string(),
            "failed (failed), result exit-code, its main process exited with status 2"
        );
        state.main_exit = MainExit::from_properties(2, 9);
        assert!(state.to_string().ends_with("was killed by signal 9"));
        assert!(!state.is_active());
        assert_eq!(MainExit::from_properties(0, 0), None);
    }
}
