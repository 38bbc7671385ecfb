//! Restarts a systemd unit over D-Bus and tells how it went.
