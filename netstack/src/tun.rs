//! The TUN device: packets from and to the kernel, super-packets where it offloads them.

use std::{
    cell::{Cell, RefCell},
    fmt, io,
};

use tun_rs::{AsyncDevice, DeviceBuilder, SyncDevice};

use crate::packet::{
    self, segment,
    virtio::{self, Segmentation},
};

/// Packets that wait in the device for the lane. With offload each may hold 64 KiB, so a hundred are already the
/// product of 5 Gb/s and ten milliseconds; more would only be delay.
const QUEUE: u32 = 100;

/// An open TUN device, not yet on a lane.
pub struct Tun {
    device: SyncDevice,
    name: String,
    index: u32,
    mtu: u16,
    offload: Offload,
}

/// What the kernel does for us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Super-packets both ways, checksums left to whoever needs them.
    SuperPackets,
    /// One packet at a time, and why.
    None(String),
}

impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SuperPackets => f.write_str("super-packets"),
            Self::None(why) => write!(f, "none ({why})"),
        }
    }
}

/// Why there is no TUN.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The machine has no `/dev/net/tun`.
    #[error(
        "/dev/net/tun does not exist: the kernel has no TUN driver, or the container was not given the device"
    )]
    Missing,
    /// The kernel says no.
    #[error("/dev/net/tun may not be used: CAP_NET_ADMIN is needed")]
    Forbidden,
    /// Anything else.
    #[error("a TUN device could not be made: {0}")]
    Other(#[source] io::Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::PermissionDenied => Self::Forbidden,
            // The device node is there, and nothing is behind it.
            _ if error.raw_os_error() == Some(19) || error.raw_os_error() == Some(6) => Self::Missing,
            _ => Self::Other(error),
        }
    }
}

/// Opens a TUN device and brings it up. `name` may hold `%d`, for the kernel to number. It has no addresses or
/// routes, and vanishes with the process.
///
/// # Errors
/// When the machine has none, or refuses.
pub fn open(name: &str, mtu: u16) -> Result<Tun, OpenError> {
    let build = |offload| DeviceBuilder::new().name(name).mtu(mtu).offload(offload).build_sync();
    let (device, offload) = match build(true) {
        Ok(device) => (device, Offload::SuperPackets),
        Err(error) if is_refusal(&error) => (build(false)?, Offload::None(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    // A shorter queue is better for latency; without it the tunnel still works.
    let _ = device.set_tx_queue_len(QUEUE);
    let (name, index) = (device.name()?, device.if_index()?);
    Ok(Tun { name, index, mtu, offload, device })
}

/// Whether offloads were refused, rather than the device.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

impl Tun {
    /// Interface name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Interface index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// MTU in bytes.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// What the kernel offloads.
    #[must_use]
    pub fn offload(&self) -> &Offload {
        &self.offload
    }

    /// Moves the device to the runtime that this is called on.
    pub(crate) fn attach(self) -> io::Result<Attached> {
        let offload = self.offload == Offload::SuperPackets;
        Ok(Attached {
            device: AsyncDevice::new(self.device)?,
            offload,
            joining: Cell::new(offload),
            mtu: self.mtu,
            single: RefCell::new((Vec::new(), Vec::new())),
        })
    }
}

impl fmt::Debug for Tun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tun")
            .field("name", &self.name)
            .field("offload", &self.offload)
            .finish_non_exhaustive()
    }
}

/// A TUN on a lane.
pub(crate) struct Attached {
    pub(crate) device: AsyncDevice,
    offload: bool,
    /// Whether the kernel takes super-packets; some kernels refuse them at run time.
    joining: Cell<bool>,
    mtu: u16,
    /// Scratch for packets that go one by one: a segment, and what is written.
    single: RefCell<(Vec<u8>, Vec<u8>)>,
}

/// Where a packet is in the buffer that it was read into, and what the kernel says of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Read {
    pub(crate) header: virtio::Header,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Attached {
    /// A buffer that any read fits.
    pub(crate) fn read_buffer() -> Vec<u8> {
        vec![0; virtio::LENGTH + packet::MAX]
    }

    /// Whether super-packets are taken (still).
    pub(crate) fn joining(&self) -> bool {
        self.joining.get()
    }

    /// Reads one packet or super-packet; `WouldBlock` if there is none, `None` for one of an unknown kind.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<Read>> {
        let end = self.device.try_recv(buffer)?;
        if !self.offload {
            return Ok(Some(Read { header: virtio::Header::default(), start: 0, end }));
        }
        let header = virtio::Header::decode(&buffer[..end]);
        Ok(header.map(|header| Read { header, start: virtio::LENGTH, end }))
    }

    /// Writes a virtio header and the packet behind it.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let Some(header) = virtio::Header::decode(bytes) else { return Ok(()) };
        if self.offload && (self.joining.get() || header.segmentation == Segmentation::None) {
            match self.device.try_send(bytes) {
                Ok(_) => return Ok(()),
                // Linux 6.1.103, 6.6.44 and 6.10 to 6.10.3 refuse any super-packet.
                Err(error) if header.segmentation != Segmentation::None && is_refusal(&error) => {
                    self.joining.set(false);
                    tracing::warn!(%error, "the kernel refuses super-packets; sending one packet at a time");
                }
                Err(error) => return Err(error),
            }
        }
        self.write_one_by_one(header, &bytes[virtio::LENGTH..])
    }

    fn write_one_by_one(&self, header: virtio::Header, packet: &[u8]) -> io::Result<()> {
        let (piece, out) = &mut *self.single.borrow_mut();
        let mut whole = packet.to_vec();
        let size = self.mtu.saturating_sub(header.headers);
        let mut result = Ok(());
        let mut send = |packet: &[u8]| {
            out.clear();
            out.resize(if self.offload { virtio::LENGTH } else { 0 }, 0);
            out.extend_from_slice(packet);
            if let Err(error) = self.device.try_send(out) {
                result = Err(error);
            }
        };
        if header.needs_checksum {
            segment::split(&mut whole, size, piece, send);
        } else {
            send(&whole);
        }
        result
    }
}
