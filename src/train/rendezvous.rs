//! Where the ranks of a run, each a process, meet: rank 0 hands out a token and all watch each other from then on.
//!
//! Reductions run on the devices, where a rank that has died leaves the others waiting without end. Every rank therefore
//! keeps a connection to rank 0, whose loss is noticed at once.

use super::launch::Place;
use crate::error::{Error, ErrorKind, Result};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a rank says first, with its number and the number of ranks.
const GREETING: &[u8; 8] = b"bfly-rk1";
/// What a rank says that ends as it should.
const DONE: u8 = b'd';
/// What rank 0 says where a rank is lost, with its number.
const LOST: u8 = b'l';
const PAUSE: Duration = Duration::from_millis(50);

/// Connections to the other ranks; a rank that drops it has ended as it should.
pub struct Rendezvous {
    streams: Vec<TcpStream>,
    over: Arc<AtomicBool>,
}

fn fail(place: &Place, e: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Backend, format!("ranks at {}:{}", place.host, place.port), e)
}

/// Waits for all ranks, at most `timeout`, and gives each the bytes that `token` makes on rank 0. `lost` is called, on a
/// thread of its own, with the number of a rank that ended without leaving.
///
/// # Errors
/// A port that is taken, ranks that do not come in time (by number), or a rank of another run.
pub fn meet(
    place: &Place,
    timeout: Duration,
    token: impl FnOnce() -> Result<Vec<u8>>,
    lost: impl Fn(usize) + Send + Sync + 'static,
) -> Result<(Vec<u8>, Rendezvous)> {
    let (end, lost, over) = (Instant::now() + timeout, Arc::new(lost), Arc::new(AtomicBool::new(false)));
    if place.rank == 0 {
        let listener = TcpListener::bind(("0.0.0.0", place.port)).map_err(|e| fail(place, e))?;
        let token = token()?;
        let peers = accept(place, &listener, end)?;
        let size = (token.len() as u32).to_le_bytes();
        for (_, stream) in &peers {
            (&*stream).write_all(&size).and_then(|()| (&*stream).write_all(&token)).map_err(|e| fail(place, e))?;
        }
        let streams = peers.iter().map(|(_, s)| s.try_clone()).collect::<std::io::Result<Vec<_>>>();
        let streams = streams.map_err(|e| fail(place, e))?;
        for (rank, stream) in peers {
            let others = streams.iter().map(TcpStream::try_clone).collect::<std::io::Result<Vec<_>>>();
            let (others, lost, over) = (others.map_err(|e| fail(place, e))?, lost.clone(), over.clone());
            std::thread::spawn(move || {
                if !says_done(&stream) && !over.load(Ordering::SeqCst) {
                    let mut message = vec![LOST];
                    message.extend((rank as u32).to_le_bytes());
                    others.iter().for_each(|s| drop((&*s).write_all(&message)));
                    lost(rank);
                }
            });
        }
        return Ok((token, Rendezvous { streams, over }));
    }
    let stream = connect(place, end)?;
    let own = [place.rank as u32, place.count as u32].map(u32::to_le_bytes).concat();
    let greeted = (&stream).write_all(&[&GREETING[..], &own].concat()).and_then(|()| {
        stream.set_read_timeout(Some(end.saturating_duration_since(Instant::now()).max(PAUSE)))?;
        let mut size = [0; 4];
        (&stream).read_exact(&mut size)?;
        let mut token = vec![0; (u32::from_le_bytes(size) as usize).min(1 << 16)];
        (&stream).read_exact(&mut token)?;
        stream.set_read_timeout(None)?;
        Ok((token, stream.try_clone()?))
    });
    let (token, watched) = greeted.map_err(|e| fail(place, format!("rank 0 does not answer: {e}")))?;
    let flag = over.clone();
    std::thread::spawn(move || {
        let mut said = [0; 1];
        let first = (&watched).read_exact(&mut said);
        if flag.load(Ordering::SeqCst) || (first.is_ok() && said[0] == DONE) {
            return;
        }
        let mut rank = [0; 4];
        let named = first.is_ok() && said[0] == LOST && (&watched).read_exact(&mut rank).is_ok();
        lost(if named { u32::from_le_bytes(rank) as usize } else { 0 });
    });
    Ok((token, Rendezvous { streams: vec![stream], over }))
}

/// Whether the other side says [`DONE`] before its connection ends.
fn says_done(mut stream: &TcpStream) -> bool {
    let mut said = [0; 1];
    stream.read_exact(&mut said).is_ok() && said[0] == DONE
}

/// All other ranks, with their numbers.
fn accept(place: &Place, listener: &TcpListener, end: Instant) -> Result<Vec<(usize, TcpStream)>> {
    listener.set_nonblocking(true).map_err(|e| fail(place, e))?;
    let mut peers: Vec<(usize, TcpStream)> = vec![];
    while peers.len() + 1 < place.count {
        match listener.accept() {
            Ok((stream, _)) => {
                let mut hello = [0; 16];
                let read = stream.set_nonblocking(false).and_then(|()| {
                    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                    (&stream).read_exact(&mut hello)?;
                    stream.set_read_timeout(None)
                });
                // Whatever else looks at open ports.
                if read.is_err() || hello[..8] != GREETING[..] {
                    continue;
                }
                let number = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| hello[at + i])) as usize;
                let (rank, count) = (number(8), number(12));
                if count != place.count || rank == 0 || rank >= count || peers.iter().any(|(r, _)| *r == rank) {
                    let message = format!("a rank {rank} of {count} came to a run of {}", place.count);
                    return Err(fail(place, message));
                }
                peers.push((rank, stream));
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < end => std::thread::sleep(PAUSE),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                let absent: Vec<String> =
                    (1..place.count).filter(|r| peers.iter().all(|(p, _)| p != r)).map(|r| r.to_string()).collect();
                return Err(fail(place, format!("rank {} did not come in time", absent.join(", "))));
            }
            Err(e) => return Err(fail(place, e)),
        }
    }
    Ok(peers)
}

fn connect(place: &Place, end: Instant) -> Result<TcpStream> {
    loop {
        let addresses = (place.host.as_str(), place.port).to_socket_addrs().map_err(|e| fail(place, e))?;
        let attempt = addresses.into_iter().find_map(|a| TcpStream::connect_timeout(&a, Duration::from_secs(5)).ok());
        match attempt {
            Some(stream) => return Ok(stream),
            None if Instant::now() < end => std::thread::sleep(PAUSE),
            None => return Err(fail(place, "rank 0 did not come in time")),
        }
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        for mut stream in &self.streams {
            let _ = stream.write_all(&[DONE]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{channel, Receiver};

    /// A port that is free now.
    fn port() -> Result<u16> {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
        free.map(|a| a.port()).map_err(|e| Error::io("port", e))
    }

    fn place(rank: usize, count: usize, port: u16) -> Place {
        Place { rank, count, local: rank, host: "127.0.0.1".into(), port }
    }

    type Met = (Vec<u8>, Rendezvous, Receiver<usize>);

    fn run(count: usize) -> Result<Vec<Met>> {
        let port = port()?;
        let one = |rank| -> Result<Met> {
            let (tell, told) = channel();
            let token = || Ok(vec![7; 128]);
            let lost = move |rank| {
                let _ = tell.send(rank);
            };
            let (token, rendezvous) = meet(&place(rank, count, port), Duration::from_secs(20), token, lost)?;
            Ok((token, rendezvous, told))
        };
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..count).map(|rank| scope.spawn(move || one(rank))).collect();
            all.into_iter().map(|t| t.join().map_err(|_| Error::usage("rank", "panicked"))?).collect()
        })
    }

    #[test]
    fn every_rank_gets_the_token_and_leaves_in_peace() -> Result<()> {
        let all = run(3)?;
        assert!(all.iter().all(|(token, ..)| token == &[7; 128]));
        let told: Vec<Receiver<usize>> = all
            .into_iter()
            .map(|(_, rendezvous, told)| {
                drop(rendezvous);
                told
            })
            .collect();
        // The threads end without a word: their senders are dropped.
        assert!(told.iter().all(|t| t.recv_timeout(Duration::from_secs(10)).is_err()));
        Ok(())
    }

    #[test]
    fn a_lost_rank_is_named_to_all_others() -> Result<()> {
        let mut all = run(4)?;
        let (_, rendezvous, _) = all.remove(2);
        // As where the process dies: the connection ends without a word.
        for stream in &rendezvous.streams {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
        for (_, _, told) in &all {
            assert_eq!(told.recv_timeout(Duration::from_secs(10)).ok(), Some(2));
        }
        std::mem::forget(rendezvous);
        Ok(())
    }

    #[test]
    fn absent_ranks_are_named() -> Result<()> {
        let token = || Ok(vec![]);
        let error = meet(&place(0, 3, port()?), Duration::from_millis(200), token, |_| ()).err();
        let message = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("rank 1, 2 did not come in time"), "{message}");
        let error = meet(&place(1, 3, port()?), Duration::from_millis(200), || Ok(vec![]), |_| ()).err();
        let message = error.map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains("rank 0 did not come in time"), "{message}");
        Ok(())
    }
}
