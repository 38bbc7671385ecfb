//! Compares a generation with its manifest, cheaply or byte for byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use km_host::{Error as HostError, atomic};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_OMIT, utimensat};
use rustix::io::Errno;

use super::generations::stamp_of;
use super::{Store, look, names, verity};
use crate::digest::{Algorithm, Digest, Hasher};
use crate::error::{Error, Result};
use crate::generation::{
    ArtifactFile, ArtifactLink, Damage, FILE_MODE, Generation, Problem, Stamp,
};
use crate::unpack::path::{RESERVED, parents};

/// Bytes hashed at once.
const READ_BUFFER: usize = 1 << 20;

/// The most threads that hash: more than this and the disk is what is waited for.
const HASH_THREADS: usize = 8;

struct Expected<'a> {
    path: &'a str,
    digest: &'a Digest,
    size: u64,
    mode: u32,
    stamp: Stamp,
    file: Option<&'a ArtifactFile>,
}

/// How a file is hashed; `None` when the kernel refuses to read it.
type Hash<'a> = dyn Fn(&Path, &fs::Metadata, Algorithm) -> Result<Option<Digest>> + 'a;

/// A file, and what it is hashed by. Who replaces or writes to it while it is hashed makes it another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    device: u64,
    inode: u64,
    modified: (i64, i64),
    size: u64,
    algorithm: Algorithm,
}

impl Key {
    fn new(meta: &fs::Metadata, algorithm: Algorithm) -> Key {
        Key {
            device: meta.dev(),
            inode: meta.ino(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            size: meta.len(),
            algorithm,
        }
    }
}

impl Store {
    /// What is wrong with a generation. Shallow looks at type, size, mode, inode and time of the last write, and hashes
    /// only what these make doubtful; deep hashes everything.
    ///
    /// # Errors
    /// When the disk fails; a difference is no error.
    pub fn check(&self, generation: &Generation, deep: bool) -> Result<Vec<Damage>> {
        check(generation, deep, &|path, _, algorithm| {
            content(path, algorithm)
        })
    }

    /// What is wrong with each of these generations, with every file hashed: each inode once, on all processors, the largest
    /// first, since it decides when all are done.
    ///
    /// # Errors
    /// When the disk fails; a difference is no error.
    pub fn verify(&self, generations: &[Generation]) -> Result<Vec<Vec<Damage>>> {
        let hashes = hash_all(generations)?;
        let known = |path: &Path, meta: &fs::Metadata, algorithm| {
            let known = hashes.get(&Key::new(meta, algorithm));
            known.map_or_else(|| content(path, algorithm), |digest| Ok(digest.clone()))
        };
        let mut all = Vec::new();
        for generation in generations {
            all.push(check(generation, true, &known)?);
        }
        Ok(all)
    }

    /// How many of the files of a generation the kernel guards with fs-verity, and how many there are.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sealed(&self, generation: &Generation) -> Result<(usize, usize)> {
        let manifest = &generation.manifest;
        let files = manifest.files.iter().map(|stored| &stored.file.path);
        let derived = manifest.derived.iter().map(|stored| &stored.path);
        let (mut sealed, mut all) = (0, 0);
        for path in files.chain(derived) {
            all += 1;
            sealed += usize::from(verity::is_sealed(&generation.dir.join(path))?);
        }
        Ok((sealed, all))
    }

    /// Makes every later look hash these files, which size and times do not show to be damaged: their time of the last write is
    /// set to the epoch. fs-verity lets that be changed, and whoever may not change it cannot repair the store either.
    ///
    /// # Errors
    /// When a file's times cannot be set.
    pub fn doubt(&self, damages: &[Damage]) -> Result<()> {
        let epoch = Timespec::default();
        let keep = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        };
        let times = Timestamps {
            last_access: keep,
            last_modification: epoch,
        };
        for damage in damages {
            if matches!(
                damage.problem,
                Problem::Content { .. } | Problem::Unreadable
            ) {
                let path = &damage.path;
                utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(HostError::io("set the times of", path))?;
            }
        }
        Ok(())
    }

    /// Drops damaged contents from the store, so that the next pull fetches them again. Generations keep their links: a
    /// new one is to be made. The lock must be held.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn discard(&self, damages: &[Damage]) -> Result<()> {
        for file in damages.iter().filter_map(|damage| damage.file.as_ref()) {
            for path in [self.file_path(file), self.blob_path(&file.digest)] {
                let size = look(&path)?.map(|meta| meta.len());
                let Some(size) = size else { continue };
                if size != file.size
                    || content(&path, file.digest.algorithm())?.as_ref() != Some(&file.digest)
                {
                    atomic::remove_file(&path)?;
                }
            }
        }
        Ok(())
    }
}

/// See [`Store::check`].
fn check(generation: &Generation, deep: bool, hash: &Hash<'_>) -> Result<Vec<Damage>> {
    let mut damages = Vec::new();
    let manifest = &generation.manifest;
    let files = manifest.files.iter().map(|stored| Expected {
        path: &stored.file.path,
        digest: &stored.file.digest,
        size: stored.file.size,
        mode: stored.file.mode(),
        stamp: stored.stamp,
        file: Some(&stored.file),
    });
    let derived = manifest.derived.iter().map(|stored| Expected {
        path: &stored.path,
        digest: &stored.digest,
        size: stored.size,
        mode: FILE_MODE,
        stamp: stored.stamp,
        file: None,
    });
    for expected in files.chain(derived) {
        let path = generation.dir.join(expected.path);
        if let Some(problem) = file_problem(&path, &expected, deep, hash)? {
            damages.push(Damage {
                path,
                problem,
                file: expected.file.cloned(),
            });
        }
    }
    for link in &manifest.links {
        let path = generation.dir.join(&link.path);
        if let Some(problem) = link_problem(&path, link)? {
            damages.push(Damage {
                path,
                problem,
                file: None,
            });
        }
    }
    unexpected(generation, &mut damages)?;
    Ok(damages)
}

fn file_problem(
    path: &Path,
    expected: &Expected<'_>,
    deep: bool,
    hash: &Hash<'_>,
) -> Result<Option<Problem>> {
    let Some(meta) = look(path)? else {
        return Ok(Some(Problem::Missing));
    };
    if !meta.is_file() {
        return Ok(Some(Problem::Kind {
            expected: "a regular file",
        }));
    }
    if meta.len() != expected.size {
        return Ok(Some(Problem::Size {
            expected: expected.size,
            got: meta.len(),
        }));
    }
    if deep || stamp_of(&meta) != expected.stamp {
        let Some(got) = hash(path, &meta, expected.digest.algorithm())? else {
            return Ok(Some(Problem::Unreadable));
        };
        if got != *expected.digest {
            return Ok(Some(Problem::Content {
                expected: expected.digest.clone(),
                got,
            }));
        }
    }
    let mode = meta.permissions().mode() & 0o7777;
    Ok((mode != expected.mode).then_some(Problem::Mode {
        expected: expected.mode,
        got: mode,
    }))
}

fn link_problem(path: &Path, link: &ArtifactLink) -> Result<Option<Problem>> {
    match look(path)? {
        None => Ok(Some(Problem::Missing)),
        Some(meta) if !meta.is_symlink() => Ok(Some(Problem::Kind {
            expected: "a symlink",
        })),
        Some(_) => {
            let target = fs::read_link(path).map_err(HostError::io("read symlink", path))?;
            Ok(
                (target != Path::new(&link.target)).then(|| Problem::Target {
                    expected: link.target.clone(),
                    got: target.display().to_string(),
                }),
            )
        }
    }
}

/// Finds what somebody put into a generation, through the class's symlink as a rule.
fn unexpected(generation: &Generation, damages: &mut Vec<Damage>) -> Result<()> {
    let manifest = &generation.manifest;
    let paths = manifest
        .files
        .iter()
        .map(|stored| stored.file.path.as_str())
        .chain(manifest.derived.iter().map(|stored| stored.path.as_str()))
        .chain(manifest.links.iter().map(|link| link.path.as_str()));
    let mut known = BTreeSet::from([RESERVED]);
    for path in paths {
        known.insert(path);
        known.extend(parents(path));
    }
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        for name in names(&generation.dir.join(&folder))? {
            let path = if folder.is_empty() {
                name
            } else {
                format!("{folder}/{name}")
            };
            let at: PathBuf = generation.dir.join(&path);
            if !known.contains(path.as_str()) {
                damages.push(Damage {
                    path: at,
                    problem: Problem::Unexpected,
                    file: None,
                });
            } else if look(&at)?.is_some_and(|meta| meta.is_dir()) {
                folders.push(path);
            }
        }
    }
    Ok(())
}

/// The digest of every file of these generations that is there.
fn hash_all(generations: &[Generation]) -> Result<BTreeMap<Key, Option<Digest>>> {
    let mut files: BTreeMap<Key, PathBuf> = BTreeMap::new();
    for generation in generations {
        let manifest = &generation.manifest;
        let stored = manifest.files.iter().map(|stored| &stored.file);
        let stored = stored.map(|file| (&file.path, &file.digest));
        let derived = manifest.derived.iter().map(|one| (&one.path, &one.digest));
        for (path, digest) in stored.chain(derived) {
            let path = generation.dir.join(path);
            if let Some(meta) = look(&path)?.filter(fs::Metadata::is_file) {
                files.insert(Key::new(&meta, digest.algorithm()), path);
            }
        }
    }
    let mut files: Vec<_> = files.into_iter().collect();
    files.sort_by_key(|(key, _)| std::cmp::Reverse(key.size));
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(Key, Option<Digest>)>> {
        let mut done = Vec::new();
        while let Some((key, path)) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            done.push((key.clone(), content(path, key.algorithm)?));
        }
        Ok(done)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.min(files.len()).min(HASH_THREADS);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut hashes: BTreeMap<Key, Option<Digest>> = work()?.into_iter().collect();
        for other in others {
            match other.join() {
                Ok(done) => hashes.extend(done?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(hashes)
    })
}

/// The digest of a file's content; `None` when the kernel refuses to read it, as fs-verity does with a block that was changed on
/// the disk, and a disk with one that it has lost.
fn content(path: &Path, algorithm: Algorithm) -> Result<Option<Digest>> {
    match hash_file(path, algorithm) {
        Ok(digest) => Ok(Some(digest)),
        Err(error) if is_input_output(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_input_output(error: &Error) -> bool {
    let Error::Host(host) = error else {
        return false;
    };
    host.raw_os_error() == Some(Errno::IO.raw_os_error())
}

/// Hashes a file's content.
pub(crate) fn hash_file(path: &Path, algorithm: Algorithm) -> Result<Digest> {
    let mut file = File::open(path).map_err(HostError::io("open", path))?;
    let mut hasher = Hasher::with(algorithm);
    let mut buffer = vec![0; READ_BUFFER];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(got) => hasher.update(&buffer[..got]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(HostError::io("read", path)(error).into()),
        }
    }
}
