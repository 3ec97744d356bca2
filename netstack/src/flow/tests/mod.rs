//! Engines back to back over a pipe in memory, with kernel sockets on 127.0.0.1 at both ends.

mod datagrams;
mod garbage;
mod own_datagrams;
mod pair;
mod refusal;
mod streams;
mod transfer;
