//! Launches as Kata writes them, right and wrong: what is refused and why, what is added, what is tuned.

mod forms;
mod inject;
mod right;
mod tune;
mod wrong;
