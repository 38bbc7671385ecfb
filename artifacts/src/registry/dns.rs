//! Resolves host names from `/etc/hosts` and the name servers of `/etc/resolv.conf`.
//!
//! A static program cannot leave this to the C library: for each entry of `nsswitch.conf` that it does not have inside, it loads
//! the machine's own library, which fits only a machine with the same C library.
//!
//! It must not know of registries.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::OnceLock;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{LookupIpStrategy, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::parse_resolv_conf;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Where the name servers are written, resolv.conf(5).
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The machine's resolver. Its files are read when the first name is looked up.
#[derive(Debug, Default)]
pub(super) struct SystemResolver {
    resolver: OnceLock<TokioResolver>,
}

impl SystemResolver {
    fn get(&self) -> Result<TokioResolver, NetError> {
        if let Some(resolver) = self.resolver.get() {
            return Ok(resolver.clone());
        }
        let (config, options) = configuration(std::fs::read(RESOLV_CONF).ok().as_deref());
        let provider = TokioRuntimeProvider::default();
        let mut builder = TokioResolver::builder_with_config(config, provider);
        *builder.options_mut() = options;
        builder.options_mut().ip_strategy = LookupIpStrategy::Ipv6AndIpv4;
        let made = builder.build()?;
        Ok(self.resolver.get_or_init(|| made).clone())
    }
}

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let resolver = self.get();
        Box::pin(async move {
            let found = resolver?.lookup_ip(name.as_str()).await?;
            let addresses: Vec<_> = found.iter().map(|ip| SocketAddr::new(ip, 0)).collect();
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// What a resolv.conf says. One that is not there or names no server means the server on this machine, as resolv.conf(5) has it;
/// never a public one.
fn configuration(text: Option<&[u8]>) -> (ResolverConfig, ResolverOpts) {
    if let Some(parsed) = text.and_then(|text| parse_resolv_conf(text).ok()) {
        return parsed;
    }
    let here = NameServerConfig::udp_and_tcp(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let config = ResolverConfig::from_parts(None, Vec::new(), vec![here]);
    (config, ResolverOpts::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(text: Option<&[u8]>) -> Vec<IpAddr> {
        let (config, _) = configuration(text);
        config
            .name_servers()
            .iter()
            .map(|server| server.ip)
            .collect()
    }

    #[test]
    fn asks_the_named_servers_with_their_search_list() {
        let text =
            b"search example.org lab.example.org\nnameserver 192.0.2.1\nnameserver 2001:db8::1\n";
        let wanted: [IpAddr; 2] = [[192, 0, 2, 1].into(), "2001:db8::1".parse().unwrap()];
        assert_eq!(servers(Some(text)), wanted);
        assert_eq!(configuration(Some(text)).0.search().len(), 2);
    }

    #[test]
    fn asks_nobody_but_this_machine_when_no_server_is_named() {
        for text in [
            None,
            Some(&b""[..]),
            Some(b"options ndots:5\n"),
            Some(b"\xff\xfe nameserver\n"),
        ] {
            assert_eq!(servers(text), [Ipv4Addr::LOCALHOST]);
        }
    }

    #[tokio::test]
    async fn knows_the_hosts_file() {
        let found = SystemResolver::default()
            .resolve("localhost".parse().unwrap())
            .await;
        assert!(found.unwrap().all(|address| address.ip().is_loopback()));
    }
}
