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
        Ok(Conversation::over(socket.into()))
    }

    /// A conversation on a socket that is there and does not block.
    pub(crate) fn over(socket: UnixStream) -> Conversation {
        Conversation {
            wire: Wire(Rc::new(RefCell::new(Line {
                socket,
                unsent: Vec::new(),
                empty: false,
                full: false,
                deadline: Instant::now(),
                lost: None,
            }))),
            tasks: Tasks::default(),
            woken: Arc::default(),
        }
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
        let mut deadline = deadline;
        self.until_and_meanwhile(future, &mut deadline, &mut None::<fn()>)
    }

    /// Goes on until a future is done, and does something of the caller's when all has been said and the first answer is waited for. The
    /// deadline comes later by the time that this takes.
    ///
    /// # Errors
    /// [`Late`].
    pub(crate) fn until_and_meanwhile<F: Future>(
        &self,
        future: F,
        deadline: &mut Instant,
        meanwhile: &mut Option<impl FnOnce()>,
    ) -> Result<F::Output, Late> {
        let mut future = pin!(future);
        let waker = Waker::from(Arc::clone(&self.woken));
        let mut context = Context::from_waker(&waker);
        self.wire.0.borrow_mut().deadline = *deadline;
        loop {
            self.woken.0.store(true, Ordering::Relaxed);
            while self.woken.0.swap(false, Ordering::Relaxed) {
                if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
                    return Ok(output);
                }
                self.tasks.poll(&mut context);
                if Instant::now() >= *deadline {
                    return Err(Late);
                }
            }
            if self.wire.send() == Sent::Again {
                continue;
            }
            if self.wire.has_said_all()
                && let Some(work) = meanwhile.take()
            {
                let began = Instant::now();
                work();
                *deadline += began.elapsed();
                self.wire.0.borrow_mut().deadline = *deadline;
            }
            self.wire.wait()?;
        }
    }
}

impl std::fmt::Debug for Conversation {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Conversation").finish_non_exhaustive()
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
        let mut all = self.0.borrow_mut();
        if !all.is_empty() {
            context.waker().wake_by_ref();
        }
        all.append(&mut tasks);
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
    /// Whether somebody waits for room to write, or for all to be sent.
    full: bool,
    /// When it has taken too long.
    deadline: Instant,
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

/// What sending has changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sent {
    /// Somebody can go on: there is room again, or the socket is lost.
    Again,
    /// The socket is waited for.
    Waits,
}

impl Wire {
    /// Sends what there is room for.
    fn send(&self) -> Sent {
        let mut line = self.0.borrow_mut();
        let before = line.unsent.len();
        if let Err(error) = line.send() {
            // Whoever reads next is told.
            line.lost = Some(error);
            return Sent::Again;
        }
        match std::mem::take(&mut line.full) && line.unsent.len() < before {
            true => Sent::Again,
            false => Sent::Waits,
        }
    }

    fn has_said_all(&self) -> bool {
        self.0.borrow().unsent.is_empty()
    }

    /// Waits until the socket has something new, or there is room again.
    fn wait(&self) -> Result<(), Late> {
        let mut line = self.0.borrow_mut();
        let mut events = PollFlags::IN;
        events.set(PollFlags::OUT, !line.unsent.is_empty());
        loop {
            let left = line.deadline.saturating_duration_since(Instant::now());
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
        // Who talks without end is read without a pause.
        if Instant::now() >= line.deadline {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
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
            line.full = true;
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
        if !line.unsent.is_empty() {
            line.full = true;
            return Poll::Pending;
        }
        Poll::Ready(line.socket.shutdown(std::net::Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    use hyper::rt::{Read as _, ReadBuf, Write as _};

    use super::*;

    fn pair() -> (tempfile::TempDir, Conversation, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let conversation = Conversation::connect(&dir.path().join("s")).unwrap();
        let peer = listener.accept().unwrap().0;
        (dir, conversation, peer)
    }

    /// Reads once; `None` at the end.
    async fn read(mut wire: Wire) -> io::Result<Option<u8>> {
        let mut byte = [0];
        poll_fn(|context| {
            let mut buffer = ReadBuf::new(&mut byte);
            Pin::new(&mut wire)
                .poll_read(context, buffer.unfilled())
                .map_ok(|()| buffer.filled().first().copied())
        })
        .await
    }

    #[test]
    fn whoever_always_has_more_to_say_is_cut_off() {
        let (_dir, conversation, mut peer) = pair();
        peer.write_all(b"abc").unwrap();
        let later = Instant::now() + Duration::from_secs(30);
        let first = conversation.until(read(conversation.wire()), later);
        assert_eq!(first.unwrap().unwrap(), Some(b'a'));
        // By whoever reads as long as there is something,
        let over = conversation.until(read(conversation.wire()), Instant::now());
        assert_eq!(over.unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
        // and between the turns of those who always want another.
        let restless = poll_fn(|context| {
            context.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert!(conversation.until(restless, Instant::now()).is_err());
    }

    #[test]
    fn silence_ends_with_the_deadline_and_a_connection_with_its_end() {
        let (_dir, conversation, peer) = pair();
        let soon = Instant::now() + Duration::from_millis(20);
        assert!(conversation.until(read(conversation.wire()), soon).is_err());
        assert!(Instant::now() >= soon);
        drop(peer);
        let later = Instant::now() + Duration::from_secs(30);
        let end = conversation.until(read(conversation.wire()), later);
        assert_eq!(end.unwrap().unwrap(), None);
    }

    #[test]
    fn something_else_is_done_once_all_has_been_said() {
        let (_dir, conversation, mut peer) = pair();
        let (mut wire, mut asked) = (conversation.wire(), false);
        let talk = poll_fn(|context| {
            if !asked {
                asked = Pin::new(&mut wire).poll_write(context, b"?")?.is_ready();
            }
            let mut byte = [0];
            let mut buffer = ReadBuf::new(&mut byte);
            Pin::new(&mut wire)
                .poll_read(context, buffer.unfilled())
                .map_ok(|()| buffer.filled().first().copied())
        });
        let soon = Instant::now() + Duration::from_secs(30);
        let mut later = soon;
        let mut work = Some(|| {
            let mut question = [0];
            peer.read_exact(&mut question).unwrap();
            assert_eq!(&question, b"?");
            peer.write_all(b"!").unwrap();
        });
        let answer = conversation.until_and_meanwhile(talk, &mut later, &mut work);
        assert_eq!(answer.unwrap().unwrap(), Some(b'!'));
        assert!(work.is_none());
        assert!(later > soon, "what it took is not the peer's doing");
    }

    /// More than is gathered at a time, and more than a socket holds. The peer makes room between the writer's turn and the next wait, so that
    /// nothing new comes by which it could be woken.
    #[test]
    fn all_that_is_written_arrives() {
        let (_dir, conversation, mut peer) = pair();
        peer.set_nonblocking(true).unwrap();
        let all: Vec<u8> = (0..2 << 20).map(|at: u32| at.to_le_bytes()[1]).collect();
        let (mut wire, mut at, mut got) = (conversation.wire(), 0, Vec::new());
        let talk = poll_fn(|context| {
            let mut wire = Pin::new(&mut wire);
            while at < all.len()
                && let Poll::Ready(written) = wire.as_mut().poll_write(context, &all[at..])
            {
                at += written?;
            }
            if at == all.len()
                && let Poll::Ready(end) = wire.poll_shutdown(context)
            {
                return Poll::Ready(end);
            }
            let full = peer.read_to_end(&mut got).unwrap_err();
            assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
            Poll::Pending
        });
        let later = Instant::now() + Duration::from_secs(30);
        conversation.until(talk, later).unwrap().unwrap();
        peer.read_to_end(&mut got).unwrap();
        assert!(got == all);
    }
}
