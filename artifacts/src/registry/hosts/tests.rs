//! Every key of a `hosts.toml`, each way to get it wrong, and any text at all.

use super::*;
use proptest::prelude::*;

fn read(text: &str) -> HostsFile {
    parse(text).unwrap()
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

fn address(host: &Host) -> &str {
    host.root.as_ref().map_or("", Url::as_str)
}

#[test]
fn hosts_come_in_the_order_of_the_file_and_the_server_last() {
    let file = read(
        r#"
        server = "https://registry-1.docker.io"
        [host."https://z.example"]
        capabilities = ["pull"]
        [host."http://10.0.0.1:5000"]
        capabilities = ["Pull", "resolve", "push"]
        [host."a.example/cache"]
        [host."https://b.example/api"]
        override_path = true
        [host."https://c.example/v2/"]
        "#,
    );
    let all: Vec<_> = file.hosts.iter().map(address).collect();
    assert_eq!(
        all,
        [
            "https://z.example/v2",
            "http://10.0.0.1:5000/v2",
            "https://a.example/cache/v2",
            "https://b.example/api",
            "https://c.example/v2",
        ]
    );
    assert_eq!(address(&file.server), "https://registry-1.docker.io/v2");
    let can = |n: usize| {
        let c = file.hosts[n].capabilities;
        (c.pull, c.resolve, c.push)
    };
    assert_eq!(can(0), (true, false, false));
    assert_eq!(can(1), (true, true, true));
    assert_eq!(can(2), (true, true, false));
    assert_eq!(file.unknown, Vec::<String>::new());
}

#[test]
fn every_form_of_every_key() {
    let file = read(
        r#"
        ca = "ca.pem"
        client = [["a.cert", "a.key"], ["b.pem", ""]]
        [header]
        x-one = "1"
        [host."https://m.example"]
        ca = ["/one.pem", "two.pem"]
        client = ["both.pem"]
        skip_verify = true
        dial_timeout = "1m2.5s"
        proxy = "http://u:hush@proxy.example:3128"
        header = { X-Two = ["a", "b"] }
        "#,
    );
    assert_eq!(file.server.root, None);
    assert_eq!(file.server.ca, ["ca.pem"]);
    assert_eq!(
        file.server.client,
        [
            ("a.cert".to_owned(), Some("a.key".to_owned())),
            ("b.pem".to_owned(), None)
        ]
    );
    assert_eq!(file.server.headers["x-one"], "1");
    let host = &file.hosts[0];
    assert_eq!(host.ca, ["/one.pem", "two.pem"]);
    assert_eq!(host.client, [("both.pem".to_owned(), None)]);
    assert!(host.skip_verify && !file.server.skip_verify);
    assert_eq!(host.dial_timeout, Some(Duration::from_millis(62_500)));
    assert_eq!(
        host.proxy.as_ref().unwrap().expose().as_str(),
        "http://u:hush@proxy.example:3128/"
    );
    assert_eq!(host.headers.get_all("x-two").iter().count(), 2);
    let shown = format!("{host:?}");
    assert!(shown.contains("proxy.example:3128"), "{shown}");
    assert!(
        !shown.contains("\"a\"") && !shown.contains("hush"),
        "{shown}"
    );
}

#[test]
fn an_empty_file_is_the_registry_itself() {
    let file = read("");
    assert!(file.hosts.is_empty());
    assert_eq!(file.server.root, None);
    let all = file.server.capabilities;
    assert!(all.pull && all.resolve && !all.push);
}

#[test]
fn unknown_keys_are_told_by_their_whole_name() {
    let file = read("sever = \"x\"\n[host.\"https://m.example\"]\ncapability = []\n");
    assert_eq!(
        file.unknown,
        ["sever", "host.\"https://m.example\".capability"]
    );
}

#[test]
fn what_is_wrong_is_named_with_its_line() {
    let cases = [
        ("server = \n", "line 1: it is not TOML"),
        ("\nserver = 1", "line 2: server is not a text"),
        (
            "server = \"ftp://x\"",
            "line 1: the address \"ftp://x\" is not the URL of a web server",
        ),
        ("server = \"https://u:hush@x\"", "has a user name in it"),
        ("host = 1", "host is not a table"),
        ("[host]\n\"https://m\" = 1", "is not a table"),
        (
            "[host.\"https://m\"]\n\ncapabilities = [\"read\"]",
            "line 3: host.\"https://m\".capabilities has something else",
        ),
        (
            "[host.\"https://m\"]\ncapabilities = \"pull\"",
            "is not a list",
        ),
        ("[host.\"\"]", "empty name"),
        ("skip_verify = \"yes\"", "neither true nor false"),
        ("ca = 1", "neither a file nor a list"),
        ("ca = [1]", "neither a file nor a list"),
        ("client = [[\"a\"]]", "pairs of a certificate's"),
        (
            "client = [[\"a\", \"b\"], \"c\"]",
            "pairs of a certificate's",
        ),
        ("dial_timeout = \"soon\"", "dial_timeout is not a time"),
        ("dial_timeout = \"1h\"", "dial_timeout is not a time"),
        ("dial_timeout = \"0s\"", "dial_timeout is not a time"),
        ("proxy = \"socks5://x:1\"", "URL of an HTTP proxy"),
        ("proxy = \"http://u:hush@x/path\"", "URL of an HTTP proxy"),
        ("[header]\nx = 1", "\"x\" is not a usable header"),
        (
            "[header]\n\"a b\" = \"1\"",
            "\"a b\" is not a usable header",
        ),
        ("[header]\nx = \"hush\\n\"", "\"x\" is not a usable header"),
    ];
    for (text, expected) in cases {
        let error = error(text);
        assert!(error.contains(expected), "{text}: {error}");
        assert!(!error.contains("hush"), "{error}");
    }
}

#[test]
fn too_much_is_refused() {
    assert!(error(&"#".repeat(FILE_MAX as usize + 1)).contains("larger than"));
    let many: String = (0..=HOSTS_MAX)
        .map(|n| format!("[host.\"h{n}\"]\n"))
        .collect();
    assert!(error(&many).contains("more than 32 hosts"));
    // Nested so deep that a parser without a limit would end the program.
    let deep = format!("ca = {}", "[".repeat(100_000));
    assert!(parse(&deep).is_err());
}

#[test]
fn times_as_go_writes_them() {
    for (text, milliseconds) in [
        ("1s", 1000),
        ("500ms", 500),
        ("1m30s", 90_000),
        ("1.5s", 1500),
    ] {
        assert_eq!(duration(text), Some(Duration::from_millis(milliseconds)));
    }
    for text in [
        "1",
        "s",
        "-1s",
        "1us",
        "1..5s",
        "1s ",
        "9e9s",
        "99999999999999999999h",
    ] {
        assert_eq!(duration(text), None, "{text}");
    }
}

proptest! {
    #[test]
    fn any_text_is_an_error_or_a_file(text in "\\PC{0,200}|(server|ca|client|host|header|=|\\[|\\]|\"|\\.|,|\n|https://a|[a-z]| ){0,60}") {
        if let Ok(file) = parse(&text) {
            prop_assert!(file.hosts.len() <= HOSTS_MAX);
        }
    }

    #[test]
    fn any_address_leads_to_a_web_server_or_nowhere(address in "\\PC{0,40}|(https?://)?[a-z0-9.:@/?#%\\[\\]-]{1,40}", own in any::<bool>()) {
        if let Ok(url) = root(&address, own) {
            prop_assert!(matches!(url.scheme(), "http" | "https") && url.has_host());
            prop_assert!(url.username().is_empty() && url.query().is_none());
        }
    }
}
