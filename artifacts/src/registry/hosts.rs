//! containerd's `hosts.toml`: which servers stand for a registry, in which order, and what each may be asked.
//!
//! The format is containerd's (docs/hosts.md, core/remotes/docker/config/hosts.go). One difference, to the safe side: a host is
//! pushed to only when its capabilities list `push`.
//!
//! It must not know of folders, connections or what is fetched.

use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use toml_edit::{Item, TableLike, Value};

use super::answer::clean;
use super::options::ProxyUrl;

/// The largest `hosts.toml` that is read, in bytes. Real ones have some hundred.
pub(super) const FILE_MAX: u64 = 256 * 1024;

/// The most hosts of one file. Each is asked in turn, so that more would only delay the error.
const HOSTS_MAX: usize = 32;

/// The most headers of one host.
const HEADERS_MAX: usize = 32;

/// The most files that `ca` or `client` may name.
const FILES_MAX: usize = 32;

/// The longest `dial_timeout`. A longer one would look like a program that hangs.
const DIAL_MAX: Duration = Duration::from_secs(300);

/// Why a `hosts.toml` cannot be used. It names keys and hosts, and no value of a header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", place(*line))]
pub struct HostsError {
    /// Counted from 1; 0 when it is not known.
    line: usize,
    problem: String,
}

fn place(line: usize) -> String {
    if line == 0 {
        String::new()
    } else {
        format!("line {line}: ")
    }
}

/// What a server may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Content by its digest.
    pub(super) pull: bool,
    /// What a tag means.
    pub(super) resolve: bool,
    /// To take content; only when it is listed.
    pub(super) push: bool,
}

/// A server and how it is talked to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Host {
    /// Where its API is, `/v2` included; none for the registry's own address.
    pub(super) root: Option<Url>,
    pub(super) capabilities: Capabilities,
    /// Files with certificates (PEM).
    pub(super) ca: Vec<String>,
    /// Files with a client's certificate and its key (PEM); one file for both when there is no second.
    pub(super) client: Vec<(String, Option<String>)>,
    pub(super) skip_verify: bool,
    /// Never shown: values are marked as sensitive.
    pub(super) headers: HeaderMap,
    pub(super) dial_timeout: Option<Duration>,
    pub(super) proxy: Option<ProxyUrl>,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostsFile {
    /// In the order in which they are to be tried.
    pub(super) hosts: Vec<Host>,
    /// What is tried last.
    pub(super) server: Host,
    /// Keys that mean nothing to us, as `host."https://..".key`.
    pub(super) unknown: Vec<String>,
}

/// Reads a file's text.
pub(super) fn parse(text: &str) -> Result<HostsFile, HostsError> {
    if text.len() as u64 > FILE_MAX {
        return Err(HostsError {
            line: 0,
            problem: format!("it is larger than {FILE_MAX} bytes"),
        });
    }
    let document = toml_edit::Document::parse(text).map_err(|error| HostsError {
        line: error.span().map_or(0, |span| line_of(text, span.start)),
        problem: format!("it is not TOML: {}", clean(error.message())),
    })?;
    let mut reader = Reader {
        text,
        unknown: Vec::new(),
    };
    let root = document.as_table();
    let address = reader.string(root, "server", "")?.unwrap_or_default();
    let server = reader.host(root, address, "")?;
    let mut hosts = Vec::new();
    if let Some(item) = root.get("host") {
        let all = item
            .as_table_like()
            .ok_or_else(|| reader.wrong(item, "host is not a table"))?;
        if all.len() > HOSTS_MAX {
            return Err(reader.wrong(item, &format!("it has more than {HOSTS_MAX} hosts")));
        }
        for (name, item) in all.iter() {
            let path = format!("host.{:?}.", shown(name));
            let table = item
                .as_table_like()
                .ok_or_else(|| reader.wrong(item, &format!("{path} is not a table")))?;
            if name.is_empty() {
                return Err(reader.wrong(item, "a host has an empty name"));
            }
            hosts.push(reader.host(table, name, &path)?);
        }
    }
    Ok(HostsFile {
        hosts,
        server,
        unknown: reader.unknown,
    })
}

struct Reader<'a> {
    text: &'a str,
    unknown: Vec<String>,
}

impl Reader<'_> {
    fn wrong(&self, item: &Item, problem: &str) -> HostsError {
        HostsError {
            line: item.span().map_or(0, |span| line_of(self.text, span.start)),
            problem: problem.to_owned(),
        }
    }

    /// The settings of one server. `path` is what its keys begin with in messages: empty for the file's own.
    fn host(
        &mut self,
        table: &dyn TableLike,
        address: &str,
        path: &str,
    ) -> Result<Host, HostsError> {
        for (key, _) in table.iter() {
            let known = matches!(
                key,
                "capabilities"
                    | "ca"
                    | "client"
                    | "skip_verify"
                    | "header"
                    | "override_path"
                    | "dial_timeout"
                    | "proxy"
            );
            let of_the_file = path.is_empty() && matches!(key, "server" | "host");
            if !known && !of_the_file {
                self.unknown.push(format!("{path}{}", clean(key)));
            }
        }
        let override_path = self.flag(table, "override_path", path)?;
        let root = match address {
            "" => None,
            address => Some(root(address, override_path).map_err(|problem| {
                let problem = format!("the address {:?} {problem}", shown(address));
                match table.get("server").filter(|_| path.is_empty()) {
                    Some(item) => self.wrong(item, &problem),
                    None => HostsError { line: 0, problem },
                }
            })?),
        };
        Ok(Host {
            root,
            capabilities: self.capabilities(table, path)?,
            ca: self.files(table, "ca", path)?,
            client: self.pairs(table, path)?,
            skip_verify: self.flag(table, "skip_verify", path)?,
            headers: self.headers(table, path)?,
            dial_timeout: self.dial_timeout(table, path)?,
            proxy: self.proxy(table, path)?,
        })
    }

    fn string<'t>(
        &self,
        table: &'t dyn TableLike,
        key: &str,
        path: &str,
    ) -> Result<Option<&'t str>, HostsError> {
        let Some(item) = table.get(key) else {
            return Ok(None);
        };
        let text = item.as_str();
        text.map(Some)
            .ok_or_else(|| self.wrong(item, &format!("{path}{key} is not a text")))
    }

    fn flag(&self, table: &dyn TableLike, key: &str, path: &str) -> Result<bool, HostsError> {
        let Some(item) = table.get(key) else {
            return Ok(false);
        };
        item.as_bool()
            .ok_or_else(|| self.wrong(item, &format!("{path}{key} is neither true nor false")))
    }

    fn capabilities(&self, table: &dyn TableLike, path: &str) -> Result<Capabilities, HostsError> {
        let mut all = Capabilities {
            pull: false,
            resolve: false,
            push: false,
        };
        let item = table.get("capabilities");
        let listed = item.and_then(Item::as_array);
        match (item, listed) {
            (Some(item), None) => {
                return Err(self.wrong(item, &format!("{path}capabilities is not a list")));
            }
            (Some(item), Some(listed)) if !listed.is_empty() => {
                for value in listed {
                    match value.as_str().map(str::to_ascii_lowercase).as_deref() {
                        Some("pull") => all.pull = true,
                        Some("resolve") => all.resolve = true,
                        Some("push") => all.push = true,
                        _ => {
                            let problem = format!(
                                "{path}capabilities has something else than \"pull\", \"resolve\" and \"push\""
                            );
                            return Err(self.wrong(item, &problem));
                        }
                    }
                }
            }
            _ => (all.pull, all.resolve) = (true, true),
        }
        Ok(all)
    }

    /// A file, or a list of files.
    fn files(
        &self,
        table: &dyn TableLike,
        key: &str,
        path: &str,
    ) -> Result<Vec<String>, HostsError> {
        let Some(item) = table.get(key) else {
            return Ok(Vec::new());
        };
        let wrong = || {
            let problem =
                format!("{path}{key} is neither a file nor a list of at most {FILES_MAX} files");
            self.wrong(item, &problem)
        };
        if let Some(one) = item.as_str() {
            return Ok(vec![one.to_owned()]);
        }
        let list = item.as_array().filter(|list| list.len() <= FILES_MAX);
        let texts = list.ok_or_else(wrong)?.iter().map(Value::as_str);
        texts
            .map(|text| text.map(str::to_owned).ok_or_else(wrong))
            .collect()
    }

    /// A file, a list of files, or a list of pairs of files.
    fn pairs(
        &self,
        table: &dyn TableLike,
        path: &str,
    ) -> Result<Vec<(String, Option<String>)>, HostsError> {
        let paired = |item: &Item| {
            let list = item.as_array()?;
            list.iter().any(Value::is_array).then(|| list.clone())
        };
        let Some((item, list)) = table.get("client").and_then(|i| Some((i, paired(i)?))) else {
            let files = self.files(table, "client", path)?;
            return Ok(files.into_iter().map(|file| (file, None)).collect());
        };
        let wrong = || {
            let problem = format!(
                "{path}client is not a list of at most {FILES_MAX} pairs of a certificate's and a key's file"
            );
            self.wrong(item, &problem)
        };
        if list.len() > FILES_MAX {
            return Err(wrong());
        }
        let pair = |value: &Value| {
            let pair = value.as_array().filter(|pair| pair.len() == 2)?;
            let (certificate, key) = (pair.get(0)?.as_str()?, pair.get(1)?.as_str()?);
            let key = Some(key.to_owned()).filter(|key| !key.is_empty());
            Some((certificate.to_owned(), key))
        };
        list.iter().map(|v| pair(v).ok_or_else(wrong)).collect()
    }

    fn headers(&self, table: &dyn TableLike, path: &str) -> Result<HeaderMap, HostsError> {
        let mut headers = HeaderMap::new();
        let Some(item) = table.get("header") else {
            return Ok(headers);
        };
        let wrong = |what: &str| self.wrong(item, &format!("{path}header{what}"));
        let all = item
            .as_table_like()
            .filter(|all| all.len() <= HEADERS_MAX)
            .ok_or_else(|| wrong(&format!(" is not a table of at most {HEADERS_MAX} headers")))?;
        for (name, item) in all.iter() {
            let unusable = || wrong(&format!(".{:?} is not a usable header", clean(name)));
            let header: HeaderName = name.parse().map_err(|_| unusable())?;
            let values: Vec<&str> = match item.as_array() {
                Some(list) if list.len() <= HEADERS_MAX => list
                    .iter()
                    .map(|value| value.as_str().ok_or_else(unusable))
                    .collect::<Result<_, _>>()?,
                _ => vec![item.as_str().ok_or_else(unusable)?],
            };
            for value in values {
                let mut value = HeaderValue::from_str(value).map_err(|_| unusable())?;
                value.set_sensitive(true);
                headers.append(header.clone(), value);
            }
        }
        Ok(headers)
    }

    fn dial_timeout(
        &self,
        table: &dyn TableLike,
        path: &str,
    ) -> Result<Option<Duration>, HostsError> {
        let Some(text) = self.string(table, "dial_timeout", path)? else {
            return Ok(None);
        };
        let read = duration(text).filter(|d| !d.is_zero() && *d <= DIAL_MAX);
        let item = table.get("dial_timeout");
        match (read, item) {
            (None, Some(item)) if !text.is_empty() => {
                let problem = format!(
                    "{path}dial_timeout is not a time of at most {} s, such as \"1s\" or \"500ms\"",
                    DIAL_MAX.as_secs()
                );
                Err(self.wrong(item, &problem))
            }
            (read, _) => Ok(read),
        }
    }

    fn proxy(&self, table: &dyn TableLike, path: &str) -> Result<Option<ProxyUrl>, HostsError> {
        let Some(text) = self.string(table, "proxy", path)?.filter(|t| !t.is_empty()) else {
            return Ok(None);
        };
        let usable = |url: &Url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.path() == "/"
                && url.query().is_none()
                && url.fragment().is_none()
        };
        match Url::parse(text).ok().filter(usable) {
            Some(url) => Ok(Some(ProxyUrl::new(url))),
            // Its text may hold a password.
            None => Err(HostsError {
                line: table
                    .get("proxy")
                    .and_then(Item::span)
                    .map_or(0, |span| line_of(self.text, span.start)),
                problem: format!(
                    "{path}proxy is not the URL of an HTTP proxy, such as \"http://proxy.example:3128\""
                ),
            }),
        }
    }
}

/// An address as it may be shown: without a user name and password, which do not belong there.
fn shown(address: &str) -> String {
    clean(address.rsplit('@').next().unwrap_or_default())
}

/// Where a server's API is. Without a scheme it is HTTPS; `/v2` is added unless the path is the API's own.
fn root(address: &str, override_path: bool) -> Result<Url, &'static str> {
    let text = if address.contains("://") {
        address.to_owned()
    } else {
        format!("https://{address}")
    };
    let mut url = Url::parse(&text).map_err(|_| "is not a URL")?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err("is not the URL of a web server");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("has a user name in it: put credentials into the credentials file");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("has a query or a fragment");
    }
    let path = url.path().trim_end_matches('/').to_owned();
    if override_path || path.ends_with("/v2") {
        url.set_path(&path);
    } else {
        url.set_path(&format!("{path}/v2"));
    }
    Ok(url)
}

/// A duration as Go writes it (pkg.go.dev/time, `ParseDuration`), without signs and without units below a millisecond.
fn duration(text: &str) -> Option<Duration> {
    let mut rest = text;
    let mut whole = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let unit = tail
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let number: f64 = number.parse().ok()?;
        let part = Duration::try_from_secs_f64(number * seconds).ok()?;
        whole = whole.checked_add(part)?;
        rest = tail;
    }
    Some(whole)
}

fn line_of(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or_default();
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
mod tests;
