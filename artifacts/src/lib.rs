//! Fetches OCI artifacts, verifies them, stores them by content and activates them by one rename.
