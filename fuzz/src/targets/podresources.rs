//! The kubelet's answers.

pub(crate) fn run(bytes: &[u8]) {
    // It is an answer, or an error: bounded either way by what came.
    if let Ok(pods) = km_podresources::decode_list(bytes) {
        let devices: usize = pods.iter().map(|pod| pod.plugin_devices().count()).sum();
        let claims: usize = pods.iter().map(|pod| pod.claim_devices().count()).sum();
        assert!(devices + claims <= bytes.len());
    }
}
