//! A conversation on one socket, in turns on the caller's thread.
//!
//! The shim has one question for the kubelet, and a pod waits for it. An asynchronous runtime would take longer to come up and to go than the
//! kubelet takes to answer, and its sockets write what HTTP/2 has to say piece by piece, each of which wakes the kubelet. Here whatever can
//! go on goes on; what was written meanwhile goes out at once; and then the socket is waited for.

use std::cell::RefCell;
use std::future::Future;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use hyper::rt::ReadBufCursor;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The most bytes that are written before they are sent. A question has some two hundred.
const UNSENT: usize = 16 << 10;

/// The most bytes that are read at once; HTTP/2's smallest frames fit in, and an answer about a pod.
const CHUNK: usize = 4096;

impl std::fmt::Debug for Conversation {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Conversation").finish_non_exhaustive()
    }
}

/// The conversation: what is to be polled, and the socket that all of it waits for.
pub(crate) struct Conversation {
    wire: Wire,
    tasks: Tasks,
    woken: Arc<Woken>,
}

/// The deadline has passed.
#[derive(Debug)]
pub(crate) struct Late;

impl Conversation {
    /// Connects, without waiting: where a unix socket's queue is full, this fails (unix(7), connect(2), `EAGAIN`).
    pub(crate) fn connect(path: &Path) -> io::Result<Conversation> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let family = AddressFamily::UNIX;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Conversation {
            wire: Wire(Rc::new(RefCell::new(Line {
                socket: socket.into(),
                unsent: Vec::new(),
                empty: false,
                lost: None,
            }))),
            tasks: Tasks::default(),
            woken: Arc::default(),
        })
    }

    /// The socket, for hyper.
    pub(crate) fn wire(&self) -> Wire {
        self.wire.clone()
    }

    /// What polls hyper's own futures.
    pub(crate) fn tasks(&self) -> Tasks {
        self.tasks.clone()
    }

    /// Goes on until a future is done.
    ///
    /// # Errors
    /// [`Late`].
    pub(crate) fn until<F: Future>(&self, future: F, deadline: Instant) -> Result<F::Output, Late> {
        let mut future = pin!(future);
        let waker = Waker::from(Arc::clone(&self.woken));
        let mut context = Context::from_waker(&waker);
        loop {
            self.woken.0.store(true, Ordering::Relaxed);
            while self.woken.0.swap(false, Ordering::Relaxed) {
                if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                    return Ok(output);
                }
                self.tasks.poll(&mut context);
            }
            self.wire.wait(deadline)?;
        }
    }
}

impl Drop for Conversation {
    /// A task holds what makes tasks, and with that itself.
    fn drop(&mut self) {
        drop(self.tasks.0.take());
    }
}

/// That something can go on. Everything is polled then: there are three or four futures.
#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Futures beside the one that is waited for.
#[derive(Clone, Default)]
pub(crate) struct Tasks(Rc<RefCell<Vec<Task>>>);

impl Tasks {
    fn poll(&self, context: &mut Context<'_>) {
        // They may make others meanwhile.
        let mut tasks = self.0.take();
        tasks.retain_mut(|task| task.as_mut().poll(context).is_pending());
        self.0.borrow_mut().append(&mut tasks);
    }
}

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Tasks {
    fn execute(&self, future: F) {
        self.0.borrow_mut().push(Box::pin(future));
    }
}

/// The socket, with what is still to be sent.
#[derive(Clone)]
pub(crate) struct Wire(Rc<RefCell<Line>>);

struct Line {
    socket: UnixStream,
    unsent: Vec<u8>,
    /// Whether all that had come was read when it was last looked at.
    empty: bool,
    /// Why nothing can be sent any more.
    lost: Option<io::Error>,
}

impl Line {
    /// Sends what can be sent without waiting.
    fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Wire {
    /// Sends, and waits until the socket has something new.
    fn wait(&self, deadline: Instant) -> Result<(), Late> {
        let mut line = self.0.borrow_mut();
        if let Err(error) = line.send() {
            // Whoever reads next is told.
            line.lost = Some(error);
            return Ok(());
        }
        let mut events = PollFlags::IN;
        events.set(PollFlags::OUT, !line.unsent.is_empty());
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = left.try_into().map_err(|_| Late)?;
            let mut sockets = [PollFd::new(&line.socket, events)];
            match rustix::event::poll(&mut sockets, Some(&left)) {
                Ok(0) => return Err(Late),
                Ok(_) => {
                    line.empty = false;
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(errno) => {
                    line.lost = Some(errno.into());
                    return Ok(());
                }
            }
        }
    }
}

impl hyper::rt::Read for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        let mut line = self.0.borrow_mut();
        if let Some(error) = line.lost.take() {
            return Poll::Ready(Err(error));
        }
        if line.empty {
            return Poll::Pending;
        }
        let mut chunk = [0; CHUNK];
        let room = CHUNK.min(buffer.remaining());
        loop {
            return match line.socket.read(&mut chunk[..room]) {
                Ok(read) => {
                    buffer.put_slice(&chunk[..read]);
                    Poll::Ready(Ok(()))
                }
                // Everything is polled again when the socket has something.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    line.empty = true;
                    Poll::Pending
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Poll::Ready(Err(error)),
            };
        }
    }
}

impl hyper::rt::Write for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut line = self.0.borrow_mut();
        if line.unsent.len() >= UNSENT {
            line.send()?;
        }
        let room = UNSENT.saturating_sub(line.unsent.len());
        if room == 0 {
            // It is sent before the socket is waited for, and then all is polled again.
            return Poll::Pending;
        }
        let taken = room.min(bytes.len());
        line.unsent.extend_from_slice(&bytes[..taken]);
        Poll::Ready(Ok(taken))
    }

    /// Nothing is waited for before it has been sent, so that it is on its way as soon as anybody depends on it.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut line = self.0.borrow_mut();
        line.send()?;
        Poll::Ready(line.socket.shutdown(std::net::Shutdown::Write))
    }
}
