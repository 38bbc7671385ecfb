//! The catalogue of GPU runtime classes: Kata configuration, handler tables, RuntimeClass manifests.
