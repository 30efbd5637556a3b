//! The file that is made, written by a thread of its own, so that reading and writing overlap.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{channel, sync_channel, Receiver, SyncSender};
use std::thread::JoinHandle;

use qcow2_snapshot::io::lock::start_writeback;

/// Read and written at once: of smaller ones the threads wait for each other too often.
pub(crate) const CHUNK: usize = 2 << 20;
/// The same of compressed clusters: they are unpacked on all processors until all of this is there.
pub(crate) const PACKED_CHUNK: usize = 8 << 20;
/// Zeros in pieces of this size, aligned, become holes: `qemu-img convert` does the same.
const PIECE: usize = 4096;
/// Buffers under way between the two threads.
const BUFFERS: usize = 4;
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Where it goes.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// A new file: zeros become holes.
    Sparse,
    /// Everything, in order.
    Stream,
}

/// A file that is written to. What went wrong is said by the next call.
pub(crate) struct Output {
    queue: Option<SyncSender<(u64, Vec<u8>)>>,
    used: Receiver<Vec<u8>>,
    /// Buffers that may still be made.
    more: usize,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Output {
    pub(crate) fn new(file: File, kind: Kind) -> io::Result<Output> {
        let (queue, work) = sync_channel::<(u64, Vec<u8>)>(BUFFERS);
        let (back, used) = channel();
        let thread = std::thread::Builder::new().spawn(move || {
            for (at, bytes) in work {
                match kind {
                    Kind::Sparse => {
                        write_data(&file, at, &bytes)?;
                        // The disk works while more is read: `sync_all` will wait for what is left.
                        start_writeback(&file, at, bytes.len() as u64);
                    }
                    Kind::Stream => (&file).write_all(&bytes)?,
                }
                // Nobody needs it any more at the end.
                let _ = back.send(bytes);
            }
            Ok(())
        })?;
        Ok(Output {
            queue: Some(queue),
            used,
            more: BUFFERS,
            thread: Some(thread),
        })
    }

    /// A buffer to fill; what is in it means nothing.
    pub(crate) fn buffer(&mut self) -> Vec<u8> {
        if self.more > 0 {
            self.more -= 1;
            return Vec::new();
        }
        // Where the thread has ended, the next write says why.
        self.used.recv().unwrap_or_default()
    }

    /// Write a buffer, which came from [`Output::buffer`], at its place.
    pub(crate) fn write(&mut self, at: u64, bytes: Vec<u8>) -> io::Result<()> {
        match self.queue.as_ref().map(|q| q.send((at, bytes))) {
            Some(Ok(())) => Ok(()),
            _ => self.end(),
        }
    }

    /// Wait until all is written.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.queue = None;
        match self.thread.take() {
            Some(thread) => joined(thread),
            None => Ok(()),
        }
    }

    /// The thread takes nothing any more: why?
    fn end(&mut self) -> io::Result<()> {
        let why = self.thread.take().map_or(Ok(()), joined);
        why.and(Err(io::Error::other("the writing thread has ended")))
    }
}

fn joined(thread: JoinHandle<io::Result<()>>) -> io::Result<()> {
    let ended = thread.join();
    ended.unwrap_or_else(|_| Err(io::Error::other("the writing thread has ended")))
}

/// Is it all zeros?
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(ZEROS.len())
        .all(|part| ZEROS.get(..part.len()) == Some(part))
}

/// Write what is not zeros; neighbouring pieces go out together. Pieces count from `at` on.
fn write_data(file: &File, at: u64, chunk: &[u8]) -> io::Result<()> {
    if is_zero(chunk) {
        return Ok(());
    }
    let mut start = 0;
    while start < chunk.len() {
        let rest = chunk.get(start..).unwrap_or_default();
        let empty = rest.chunks(PIECE).take_while(|p| is_zero(p)).count() * PIECE;
        let rest = rest.get(empty..).unwrap_or_default();
        let full = rest.chunks(PIECE).take_while(|p| !is_zero(p)).count() * PIECE;
        let data = rest.get(..full.min(rest.len())).unwrap_or_default();
        file.write_all_at(data, at + (start + empty) as u64)?;
        start += empty + full;
    }
    Ok(())
}
