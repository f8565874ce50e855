//! `as_linux RELEASE PROGRAM [ARGUMENT...]` executes a program that meets a kernel of an older release, as far as one can be played:
//! see `vm_scrub_tests::older`.

use std::error::Error;
use std::os::unix::process::CommandExt;
use std::process::Command;
use vm_scrub_tests::older;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let word = arguments.next().and_then(|word| word.into_string().ok());
    let release = word.as_deref().and_then(older::parse);
    let (Some(word), Some(release), Some(program)) = (word, release, arguments.next()) else {
        return Err(
            "usage: as_linux RELEASE PROGRAM [ARGUMENT...], such as as_linux 5.10 uname -r".into(),
        );
    };
    older::play(release)?;
    let mut command = Command::new(program);
    Err(command
        .args(arguments)
        .env(older::RELEASE, word)
        .exec()
        .into())
}
