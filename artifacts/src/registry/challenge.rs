//! Reads `WWW-Authenticate`: what a server wants to know before it answers.
//!
//! The text is hostile: any bytes give some list of challenges, perhaps an empty one, and never a panic. The grammar is
//! RFC 9110, 11.6.1: challenges and their parameters are separated by commas alike, so a word is a scheme unless an equals
//! sign follows it.
//!
//! It must not know of credentials or the network.

/// Text beyond this is not read. Real challenges have a few hundred bytes.
const TEXT_MAX: usize = 8 * 1024;

/// One challenge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    /// In lower case, such as `bearer`.
    pub(super) scheme: String,
    /// Names in lower case, values without quotes.
    params: Vec<(String, String)>,
}

impl Challenge {
    /// A parameter's first value.
    pub(super) fn param(&self, name: &str) -> Option<&str> {
        let mut all = self.params.iter();
        all.find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// All challenges of one header.
pub(super) fn parse(text: &str) -> Vec<Challenge> {
    let mut cursor = Cursor {
        bytes: &text.as_bytes()[..text.len().min(TEXT_MAX)],
    };
    let mut challenges: Vec<Challenge> = Vec::new();
    while !cursor.bytes.is_empty() {
        let word = cursor.token();
        if word.is_empty() {
            // A separator, or a byte that belongs nowhere.
            cursor.skip(1);
            continue;
        }
        let spaced = cursor.skip_spaces();
        match challenges.last_mut() {
            Some(challenge) if cursor.at(b'=') => {
                cursor.skip(1);
                cursor.skip_spaces();
                if let Some(value) = cursor.value() {
                    challenge.params.push((word, value));
                }
            }
            _ => {
                challenges.push(Challenge {
                    scheme: word,
                    params: Vec::new(),
                });
                if spaced {
                    cursor.skip_token68();
                }
            }
        }
    }
    challenges
}

struct Cursor<'a> {
    bytes: &'a [u8],
}

impl Cursor<'_> {
    fn at(&self, byte: u8) -> bool {
        self.bytes.first() == Some(&byte)
    }

    fn skip(&mut self, count: usize) {
        self.bytes = self.bytes.get(count..).unwrap_or_default();
    }

    fn skip_spaces(&mut self) -> bool {
        let spaces = count(self.bytes, |b| b == b' ' || b == b'\t');
        self.skip(spaces);
        spaces > 0
    }

    /// RFC 9110, 5.6.2, in lower case: names of schemes and parameters do not depend on case.
    fn token(&mut self) -> String {
        self.take(is_token).to_ascii_lowercase()
    }

    fn take(&mut self, belongs: fn(u8) -> bool) -> String {
        let length = count(self.bytes, belongs);
        let text = String::from_utf8_lossy(&self.bytes[..length]).into_owned();
        self.skip(length);
        text
    }

    /// A quoted string (RFC 9110, 5.6.4) or a bare word. An unfinished quoted string is nothing: it was cut off.
    fn value(&mut self) -> Option<String> {
        if !self.at(b'"') {
            let bare = self.take(|b| b != b',' && b != b' ' && b != b'\t');
            return (!bare.is_empty()).then_some(bare);
        }
        self.skip(1);
        let mut value = Vec::new();
        loop {
            let byte = *self.bytes.first()?;
            self.skip(1);
            match byte {
                b'"' => return Some(String::from_utf8_lossy(&value).into_owned()),
                b'\\' => {
                    value.push(*self.bytes.first()?);
                    self.skip(1);
                }
                other => value.push(other),
            }
        }
    }

    /// Schemes such as Negotiate have one blob instead of parameters (RFC 9110, 11.2, `token68`).
    fn skip_token68(&mut self) {
        let is_68 = |b: u8| b.is_ascii_alphanumeric() || b"-._~+/".contains(&b);
        let word = count(self.bytes, is_68);
        let padding = count(&self.bytes[word..], |b| b == b'=');
        let end = word + padding;
        if word > 0 && matches!(self.bytes.get(end), None | Some(b',')) {
            self.skip(end);
        }
    }
}

fn count(bytes: &[u8], belongs: impl Fn(u8) -> bool) -> usize {
    bytes.iter().take_while(|byte| belongs(**byte)).count()
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn challenge(scheme: &str, params: &[(&str, &str)]) -> Challenge {
        Challenge {
            scheme: scheme.to_owned(),
            params: params
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
        }
    }

    #[test]
    fn real_ones() {
        let hub = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#;
        let expected = challenge(
            "bearer",
            &[
                ("realm", "https://auth.docker.io/token"),
                ("service", "registry.docker.io"),
                ("scope", "repository:a/b:pull,push"),
            ],
        );
        assert_eq!(parse(hub), [expected]);
        let basic = challenge("basic", &[("realm", "Registry \"Realm\"")]);
        assert_eq!(parse(r#"Basic realm="Registry \"Realm\"""#), [basic]);
    }

    #[test]
    fn several_in_one_header_are_kept_apart() {
        let text = r#"Negotiate, NTLM YWJj==, Digest realm="a, b" , nonce=x ,Basic realm=plain, bearer  realm = "https://t" ,,"#;
        let expected = [
            challenge("negotiate", &[]),
            challenge("ntlm", &[]),
            challenge("digest", &[("realm", "a, b"), ("nonce", "x")]),
            challenge("basic", &[("realm", "plain")]),
            challenge("bearer", &[("realm", "https://t")]),
        ];
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn broken_ones_give_what_is_whole() {
        assert_eq!(parse(""), []);
        assert_eq!(parse(",,= \"\u{fffd}"), []);
        assert_eq!(parse("Bearer"), [challenge("bearer", &[])]);
        assert_eq!(
            parse(r#"Bearer service=s, realm="https://cut"#),
            [challenge("bearer", &[("service", "s")])]
        );
        assert_eq!(parse(r#"Bearer realm="cut\"#), [challenge("bearer", &[])]);
        let long = format!("Bearer realm=\"{}\"", "a".repeat(10 * TEXT_MAX));
        assert_eq!(parse(&long), [challenge("bearer", &[])]);
    }

    proptest! {
        #[test]
        fn never_panics_and_always_ends(text in "[\\PCBasicer=\", \\\\\t]*") {
            for challenge in parse(&text) {
                prop_assert!(!challenge.scheme.is_empty());
            }
        }

        #[test]
        fn quoted_values_come_back(value in "[ -~]{0,60}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let parsed = parse(&format!("Bearer a=b, realm=\"{quoted}\", c=d"));
            prop_assert_eq!(parsed.len(), 1);
            prop_assert_eq!(parsed[0].param("realm"), Some(value.as_str()));
            prop_assert_eq!(parsed[0].param("c"), Some("d"));
        }
    }
}
