//! `tpd logs`: the daemon's log, while it runs and afterwards.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use tpd_api::exit::ExitCode;
use tpd_api::local::LOG;

use crate::daemon::log;
use crate::failure::Failure;
use crate::output;

/// How often a followed log is looked at.
const POLL: Duration = Duration::from_millis(200);

/// Shows the daemon's log
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Logs {
    /// Go on as the log grows
    #[arg(short, long)]
    follow: bool,
    /// How many of the newest lines to show
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 100)]
    lines: usize,
}

impl Logs {
    pub(super) async fn run(self) -> Result<ExitCode, Failure> {
        let (text, length) = log::tail(Path::new(LOG), self.lines).map_err(|error| unreadable(&error))?;
        output::text(&text);
        if self.follow {
            follow(length).await.map_err(|error| unreadable(&error))?;
        }
        Ok(ExitCode::Ok)
    }
}

/// Prints what is appended, also after the log was set aside and begun anew. Ends with the process.
async fn follow(mut position: u64) -> io::Result<()> {
    let mut file = File::open(LOG)?;
    loop {
        file.seek(SeekFrom::Start(position))?;
        let mut grown = Vec::new();
        position += file.read_to_end(&mut grown)? as u64;
        output::text(&String::from_utf8_lossy(&grown));
        if let Ok(newest) = File::open(LOG)
            && newest.metadata()?.ino() != file.metadata()?.ino()
        {
            (file, position) = (newest, 0);
            continue;
        }
        tokio::time::sleep(POLL).await;
    }
}

fn unreadable(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(ExitCode::NotConnected, "there is no log: tpd up was never run here")
        }
        io::ErrorKind::PermissionDenied => {
            Failure::new(ExitCode::Privilege, "the log belongs to another user")
                .help("read it with sudo: sudo tpd logs")
        }
        _ => Failure::new(ExitCode::Failure, "the log cannot be read"),
    }
    .because(format!("{LOG}: {error}"))
}
