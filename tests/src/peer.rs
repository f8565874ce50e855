//! Another process that is given the descriptor of a guest's memory, as the back-end of a vhost-user device is, and does with
//! it what it is told.
//!
//! The peer is the test program once more: a test file that uses peers has a test called `peer` that calls [`serve`].

use std::fs::File;
use std::io::{Read, Write};
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::ptr;

/// Set in the peer.
const SERVE: &str = "VM_SCRUB_TEST_PEER";

/// What a peer can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Order {
    /// Map the file readable and writable.
    Map,
    /// Map it readable, through the descriptor that came.
    MapReadable,
    /// Open the file anew for reading only, and map it through that.
    MapReopened,
    /// Undo the mapping.
    Unmap,
    /// Close the descriptor.
    Close,
    /// Write to every page of the mapping.
    Fill,
    /// Write to every page of the mapping for ever. Not answered.
    FillForEver,
    /// Write a byte by the descriptor.
    Write,
    /// Count bytes that are not zero by the descriptor.
    Count,
    /// Count bytes that are not zero in the mapping.
    CountMapped,
}

const ORDERS: [Order; 10] = [
    Order::Map,
    Order::MapReadable,
    Order::MapReopened,
    Order::Unmap,
    Order::Close,
    Order::Fill,
    Order::FillForEver,
    Order::Write,
    Order::Count,
    Order::CountMapped,
];

/// Another process with the descriptor of a file. Killed when this is dropped.
#[derive(Debug)]
pub struct Peer {
    process: Child,
    socket: UnixStream,
}

impl Peer {
    /// Starts a process and sends it the descriptor.
    pub fn with(file: &File) -> Self {
        let (socket, theirs) = UnixStream::pair().expect("a socket pair");
        let process = Command::new(std::env::current_exe().expect("a test is a file"))
            .args(["peer", "--exact", "--nocapture", "--test-threads=1"])
            .env(SERVE, "1")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .expect("a test can be started once more");
        send(&socket, file.as_raw_fd());
        let mut peer = Self { process, socket };
        assert_eq!(peer.answer(), 0, "the peer has the descriptor");
        peer
    }

    fn answer(&mut self) -> u64 {
        let mut answer = [0; 8];
        self.socket.read_exact(&mut answer).expect("a peer answers");
        u64::from_ne_bytes(answer)
    }

    fn order(&mut self, order: Order) -> u64 {
        self.socket
            .write_all(&[order as u8])
            .expect("a peer listens");
        self.answer()
    }

    /// Maps the file readable and writable. The error number, or 0.
    pub fn map(&mut self) -> i32 {
        self.order(Order::Map) as i32
    }

    /// Maps the file readable through the descriptor it was given.
    pub fn map_readable(&mut self) {
        assert_eq!(self.order(Order::MapReadable), 0);
    }

    /// Maps the file readable through a descriptor of its own that is for reading only.
    pub fn map_reopened(&mut self) {
        assert_eq!(self.order(Order::MapReopened), 0);
    }

    /// Undoes its mapping.
    pub fn unmap(&mut self) {
        assert_eq!(self.order(Order::Unmap), 0);
    }

    /// Closes its descriptor.
    pub fn close(&mut self) {
        assert_eq!(self.order(Order::Close), 0);
    }

    /// Writes something that is not zero to every page of its mapping.
    pub fn fill(&mut self) {
        assert_eq!(self.order(Order::Fill), 0);
    }

    /// Begins to write to every page of its mapping, and goes on until it is killed.
    pub fn fill_for_ever(&mut self) {
        let order = [Order::FillForEver as u8];
        self.socket.write_all(&order).expect("a peer listens");
    }

    /// Writes a byte by its descriptor. The error number, or 0.
    pub fn write(&mut self) -> i32 {
        self.order(Order::Write) as i32
    }

    /// How many bytes are not zero, read by its descriptor.
    pub fn count(&mut self) -> u64 {
        self.order(Order::Count)
    }

    /// How many bytes are not zero, read in its mapping.
    pub fn count_mapped(&mut self) -> u64 {
        self.order(Order::CountMapped)
    }

    /// Kills it with `SIGKILL`, and waits until its mappings are gone.
    pub fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.end();
    }
}

/// Room for a control message with one descriptor, aligned as its header must be.
#[repr(C, align(8))]
struct Control([u8; 64]);

/// A message of one byte, with room for a descriptor beside it.
fn message(byte: &mut u8, control: &mut Control, body: impl FnOnce(&mut libc::msghdr)) {
    let mut part = libc::iovec {
        iov_base: ptr::from_mut(byte).cast(),
        iov_len: 1,
    };
    // SAFETY: all zero is a message without anything.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: computes a number.
    header.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as _;
    body(&mut header);
}

/// Sends a descriptor.
pub fn send(socket: &UnixStream, fd: RawFd) {
    let (mut byte, mut control) = (0, Control([0; 64]));
    message(&mut byte, &mut control, |header| {
        // SAFETY: the control buffer has room for one message with a descriptor, and is aligned for its header.
        let sent = unsafe {
            let first = libc::CMSG_FIRSTHDR(header);
            (*first).cmsg_level = libc::SOL_SOCKET;
            (*first).cmsg_type = libc::SCM_RIGHTS;
            (*first).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            libc::CMSG_DATA(first).cast::<RawFd>().write_unaligned(fd);
            libc::sendmsg(socket.as_raw_fd(), header, 0)
        };
        assert_eq!(sent, 1, "{}", std::io::Error::last_os_error());
    });
}

/// Waits for a descriptor. `None` when whoever was to send it is gone.
pub fn receive(socket: RawFd) -> Option<File> {
    let (mut byte, mut control) = (0, Control([0; 64]));
    let mut fd = -1;
    message(&mut byte, &mut control, |header| {
        // SAFETY: as in `send`; what arrives is a descriptor that the kernel has made for this process.
        unsafe {
            if libc::recvmsg(socket, header, 0) != 1 {
                return;
            }
            let first = libc::CMSG_FIRSTHDR(header);
            assert!(!first.is_null(), "a descriptor came");
            fd = libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned();
        }
    });
    // SAFETY: nobody else has it.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })
}

/// What the peer's process does: obeys until the socket is closed. Returns at once in any other process.
pub fn serve() {
    if std::env::var_os(SERVE).is_none() {
        return;
    }
    let file = receive(0).expect("a descriptor comes first");
    let len = file.metadata().expect("a file has a length").len() as usize;
    let mut state = Serving {
        file: Some(file),
        mapping: ptr::null_mut(),
        len,
    };
    // SAFETY: standard input is the socket, and nothing else here reads it.
    let mut socket = unsafe { UnixStream::from_raw_fd(0) };
    socket.write_all(&0_u64.to_ne_bytes()).expect("answered");
    let mut order = [0];
    while socket.read_exact(&mut order).is_ok() {
        let answer = state.obey(ORDERS[order[0] as usize]);
        if socket.write_all(&answer.to_ne_bytes()).is_err() {
            return;
        }
    }
}

struct Serving {
    file: Option<File>,
    mapping: *mut u8,
    len: usize,
}

fn errno() -> u64 {
    let number = std::io::Error::last_os_error().raw_os_error();
    number.unwrap_or_default() as u64
}

impl Serving {
    fn file(&self) -> &File {
        self.file.as_ref().expect("not closed")
    }

    fn map(&mut self, file: RawFd, protection: i32) -> u64 {
        // SAFETY: a mapping at a place of the kernel's choice.
        let mapping = unsafe {
            libc::mmap(
                ptr::null_mut(),
                self.len,
                protection,
                libc::MAP_SHARED,
                file,
                0,
            )
        };
        if mapping == libc::MAP_FAILED {
            return errno();
        }
        self.mapping = mapping.cast();
        0
    }

    fn fill(&self) {
        for page in (0..self.len).step_by(4096) {
            // SAFETY: the file is mapped over its length, which cannot change.
            unsafe { self.mapping.add(page).cast::<u64>().write_volatile(!0) };
        }
    }

    fn obey(&mut self, order: Order) -> u64 {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        match order {
            Order::Map => self.map(self.file().as_raw_fd(), both),
            Order::MapReadable => self.map(self.file().as_raw_fd(), libc::PROT_READ),
            Order::MapReopened => {
                let path = format!("/proc/self/fd/{}", self.file().as_raw_fd());
                let reopened = File::open(path).expect("reopened");
                self.map(reopened.as_raw_fd(), libc::PROT_READ)
            }
            Order::Unmap => {
                // SAFETY: mapped by this process, which has no references into it.
                let status = unsafe { libc::munmap(self.mapping.cast(), self.len) };
                status.unsigned_abs().into()
            }
            Order::Close => {
                self.file = None;
                0
            }
            Order::Fill => {
                self.fill();
                0
            }
            Order::FillForEver => loop {
                self.fill();
            },
            Order::Write => match self.file().write_at(&[0xff], 4096) {
                Ok(_) => 0,
                Err(_) => errno(),
            },
            Order::Count => {
                let mut bytes = vec![0; self.len];
                self.file().read_exact_at(&mut bytes, 0).expect("read");
                count(&bytes)
            }
            Order::CountMapped => {
                // SAFETY: the file is mapped over its length, which cannot change; the tests do not write meanwhile.
                count(unsafe { std::slice::from_raw_parts(self.mapping, self.len) })
            }
        }
    }
}

fn count(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte != 0).count() as u64
}
