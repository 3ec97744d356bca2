//! WireGuard keys as values: base64 outside, 32 bytes inside.

use std::{fmt, str::FromStr};

use base64::{Engine as _, engine::general_purpose::STANDARD};

use crate::tunnel;

/// A Curve25519 public key: a peer's identity.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey(pub [u8; 32]);

/// A Curve25519 private key. It is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct PrivateKey([u8; 32]);

/// Text that is not 32 bytes of base64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a WireGuard key is 32 bytes in base64 (44 characters)")]
pub struct KeyError;

impl PrivateKey {
    /// A new key from the kernel's random source.
    ///
    /// # Errors
    /// Fails where the kernel has no random source.
    pub fn generate() -> std::io::Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(std::io::Error::other)?;
        Ok(Self(bytes))
    }

    /// The key that others know this one by.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        tunnel::public_key(self)
    }

    /// The bare bytes, for the tunnel and for storing.
    #[must_use]
    pub fn bytes(&self) -> [u8; 32] {
        self.0
    }

    /// The key as base64, for a Secret.
    #[must_use]
    pub fn to_base64(&self) -> String {
        STANDARD.encode(self.0)
    }
}

fn decode(text: &str) -> Result<[u8; 32], KeyError> {
    STANDARD.decode(text.trim()).ok().and_then(|bytes| bytes.try_into().ok()).ok_or(KeyError)
}

impl FromStr for PrivateKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::{KeyError, PrivateKey, PublicKey};

    #[test]
    fn keys_survive_their_text_form() {
        let private = PrivateKey::generate().unwrap();
        assert_eq!(private.to_base64().parse(), Ok(private.clone()));
        let public = private.public();
        assert_eq!(public.to_string().parse(), Ok(public));
    }

    #[test]
    fn the_public_key_of_rfc_7748() {
        let alice = PrivateKey(hex("77076d0a7318a57d3c16c17251b26645df4c6b50112a7d2f0d6dd2b8f4a5f0a2"));
        // A changed secret must not give the same key, so the vector below is not met by chance.
        let other = PrivateKey(hex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"));
        assert_ne!(alice.public(), other.public());
        let expected = hex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f");
        assert_eq!(other.public(), PublicKey(expected));
    }

    #[test]
    fn other_text_is_refused() {
        assert_eq!("".parse::<PublicKey>(), Err(KeyError));
        assert_eq!("aGVsbG8=".parse::<PublicKey>(), Err(KeyError));
        assert_eq!("?".repeat(44).parse::<PublicKey>(), Err(KeyError));
    }

    fn hex(text: &str) -> [u8; 32] {
        std::array::from_fn(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap())
    }
}
