//! The platforms that an index chooses by.

use std::fmt;

use oci_spec::image;

/// What an image is built for, in the words of the OCI image specification (config.md, after Go's GOOS and GOARCH).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Operating system.
    pub os: String,
    /// Processor architecture.
    pub architecture: String,
    /// Variant of the architecture, such as `v8`. None takes whatever is there.
    pub variant: Option<String>,
}

impl Platform {
    /// This machine's.
    pub fn host() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            // The same name in Go: s390x, riscv64.
            other => other,
        };
        Platform {
            os: std::env::consts::OS.to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    /// Whether content for `other` runs here.
    pub(super) fn takes(&self, other: &image::Platform) -> bool {
        self.os == other.os().to_string()
            && self.architecture == other.architecture().to_string()
            && match (&self.variant, other.variant()) {
                (Some(wanted), Some(there)) => wanted == there,
                _ => true,
            }
    }
}

impl From<&image::Platform> for Platform {
    fn from(platform: &image::Platform) -> Platform {
        Platform {
            os: platform.os().to_string(),
            architecture: platform.architecture().to_string(),
            variant: platform.variant().clone(),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_counts_only_where_both_name_one() {
        let wanted = |variant: Option<&str>| Platform {
            os: "linux".to_owned(),
            architecture: "arm64".to_owned(),
            variant: variant.map(str::to_owned),
        };
        let there = |json: &str| serde_json::from_str::<image::Platform>(json).unwrap();
        let v8 = there(r#"{"os":"linux","architecture":"arm64","variant":"v8"}"#);
        let any = there(r#"{"os":"linux","architecture":"arm64"}"#);
        let other = there(r#"{"os":"linux","architecture":"arm","variant":"v8"}"#);
        assert!(wanted(None).takes(&v8) && wanted(Some("v8")).takes(&v8));
        assert!(wanted(Some("v9")).takes(&any) && !wanted(Some("v9")).takes(&v8));
        assert!(!wanted(None).takes(&other));
        assert_eq!(Platform::from(&v8).to_string(), "linux/arm64/v8");
    }

    #[test]
    fn this_machine_has_the_names_that_images_use() {
        let host = Platform::host();
        assert_eq!(host.os, "linux");
        assert!(!host.architecture.contains("86_64") && host.architecture != "aarch64");
    }
}
