//! Edits containerd's configuration by splices, and carries the edit out as a transaction.
