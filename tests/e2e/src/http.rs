//! As much of HTTP/1.1 (RFC 9112) as the proxy and the token server need: the head of a message.

use std::io::{self, Read};

/// The longest head that is taken; registries and their clients stay far below it.
const LONGEST_HEAD: usize = 64 * 1024;

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`, `HEAD`...
    pub method: String,
    /// Path and query, as sent.
    pub path: String,
    /// The headers, in order.
    pub headers: Vec<(String, String)>,
}

impl Request {
    /// The value of a header, whatever its case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let fits = |(key, _): &&(String, String)| key.eq_ignore_ascii_case(name);
        self.headers.iter().find(fits).map(|(_, value)| &**value)
    }

    /// Reads a head's text; none when it is no request.
    pub(crate) fn parse(head: &str) -> Option<Self> {
        let mut lines = head.split("\r\n");
        let mut words = lines.next()?.split(' ');
        Some(Self {
            method: words.next()?.to_owned(),
            path: words.next()?.to_owned(),
            headers: lines
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect(),
        })
    }

    /// The values of a query parameter, decoded, in order.
    pub(crate) fn query(&self, name: &str) -> Vec<String> {
        let query = self.path.split_once('?').map_or("", |(_, query)| query);
        query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| decode(value))
            .collect()
    }
}

/// Percent-decoding; what cannot be decoded stays as it is.
fn decode(text: &str) -> String {
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let digits = part
            .get(..2)
            .and_then(|two| u8::from_str_radix(two, 16).ok());
        match digits {
            Some(byte) => {
                bytes.push(byte);
                bytes.extend_from_slice(&part.as_bytes()[2..]);
            }
            None => bytes.extend_from_slice(format!("%{part}").as_bytes()),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads up to the empty line that ends a head; gives the head with it, and what was read beyond.
pub(crate) fn read_head(from: &mut impl Read) -> io::Result<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Ok((String::from_utf8_lossy(&bytes).into_owned(), rest));
        }
        let n = from.read(&mut buffer)?;
        if n == 0 || bytes.len() > LONGEST_HEAD {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.extend_from_slice(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_to_its_end_and_no_further() {
        let text = b"GET /token?scope=repository%3Akata%2Fguest%3Apull&scope=b%zz HTTP/1.1\r\nRANGE: bytes=1-\r\n\r\nbody";
        let (head, rest) = read_head(&mut &text[..]).unwrap();
        assert_eq!(rest, b"body");
        let request = Request::parse(&head).unwrap();
        assert_eq!(request.header("Range"), Some("bytes=1-"));
        assert_eq!(
            request.query("scope"),
            ["repository:kata/guest:pull", "b%zz"]
        );
        assert!(read_head(&mut &b"GET / HTTP/1.1\r\n"[..]).is_err());
    }
}
