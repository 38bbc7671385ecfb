//! The one door to the operating system: rooted paths, atomic writes, locks, claims, processes.
