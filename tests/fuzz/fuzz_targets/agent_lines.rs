//! Any line of an agent's connection: it is understood or refused, and what is understood survives being said again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use serde::{Serialize, de::DeserializeOwned};
use tpd_api::agent::{ToAgent, ToManager};

fuzz_target!(|line: &[u8]| {
    say_again::<ToAgent>(line);
    say_again::<ToManager>(line);
});

fn say_again<T>(line: &[u8])
where
    T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(said) = serde_json::from_slice::<T>(line) else { return };
    let again = serde_json::to_vec(&said).expect("what was read can be written");
    assert_eq!(serde_json::from_slice::<T>(&again).expect("what was written can be read"), said);
}
