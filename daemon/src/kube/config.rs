//! Finding and reading the kubeconfig as kubectl does, on behalf of the invoker.
//!
//! Under sudo it is read with the invoker's rights, and so is every file that it names: root could be made to send what it alone may read
//! to any server, and may not even read what is on a network.

use std::path::{Path, PathBuf};
use std::{env, fs};

use futures::FutureExt as _;
use kube::Config;
use kube::config::{AuthInfo, ExecConfig, KubeConfigOptions, Kubeconfig};
use tpd_api::exit::ExitCode;

use super::credentials::base64;
use crate::failure::Failure;
use crate::invoker::Invoker;

/// A context of a kubeconfig, ready to connect with.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) context: String,
    /// URL of the API server, as the kubeconfig has it.
    pub(crate) server: String,
    /// Namespace of the context.
    pub(crate) namespace: String,
    /// How to connect; without the credential plugin, which [`super::credentials`] runs, and without any other file.
    pub(crate) config: Config,
    pub(crate) plugin: Option<ExecConfig>,
    /// Where the token is, which whoever put it there may replace at any time.
    pub(crate) token_file: Option<PathBuf>,
    /// Where all this was read.
    files: Vec<PathBuf>,
}

impl Target {
    /// Reads the same context again: whoever logs in anew may have had the files rewritten.
    pub(crate) async fn reload(&self, invoker: &Invoker) -> Result<Self, Failure> {
        load_for(invoker, &self.files, Some(&self.context)).await
    }

    #[cfg(test)]
    pub(crate) fn example(server: &str) -> Self {
        Self {
            context: "example".into(),
            server: server.into(),
            namespace: "default".into(),
            config: Config::new(server.parse().unwrap()),
            plugin: None,
            token_file: None,
            files: Vec::new(),
        }
    }
}

/// The files to read, in order: `--kubeconfig`, else `$KUBECONFIG` (a list), else `~/.kube/config`.
pub(crate) fn files(invoker: &Invoker, flag: Option<&Path>) -> Result<Vec<PathBuf>, Failure> {
    if let Some(path) = flag {
        let path = invoker.absolute(path);
        return if is_file(invoker, &path) { Ok(vec![path]) } else { Err(none_found(&[path])) };
    }
    let candidates: Vec<PathBuf> = match invoker.variable("KUBECONFIG") {
        Some(list) => env::split_paths(list)
            .filter(|path| !path.as_os_str().is_empty())
            .map(|path| invoker.absolute(&path))
            .collect(),
        None => invoker.home().map(|home| home.join(".kube/config")).into_iter().collect(),
    };
    // Like kubectl: files of the list that do not exist are skipped.
    let found: Vec<_> = candidates.iter().filter(|path| is_file(invoker, path)).cloned().collect();
    if found.is_empty() { Err(none_found(&candidates)) } else { Ok(found) }
}

fn is_file(invoker: &Invoker, path: &Path) -> bool {
    invoker.act(|| path.is_file()).unwrap_or(false)
}

fn none_found(candidates: &[PathBuf]) -> Failure {
    let looked: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
    Failure::new(ExitCode::Kubeconfig, "no kubeconfig was found")
        .because(format!(
            "looked for {}",
            if looked.is_empty() { "none: HOME is not set".into() } else { looked.join(", ") }
        ))
        .help("name one with --kubeconfig FILE or KUBECONFIG=FILE; it is the file that kubectl uses")
}

/// Reads the files and picks the context, for the person behind this process.
pub(crate) async fn load(files: &[PathBuf], context: Option<&str>) -> Result<Target, Failure> {
    load_for(&Invoker::detect(), files, context).await
}

/// Reads the files and picks the context.
pub(crate) async fn load_for(
    invoker: &Invoker,
    files: &[PathBuf],
    context: Option<&str>,
) -> Result<Target, Failure> {
    let (files, context) = (files.to_vec(), context.map(str::to_owned));
    let picked = invoker.act_aside(move || pick(files, context.as_deref())).await.unwrap_or_else(|error| {
        Err(Failure::new(ExitCode::Kubeconfig, "the kubeconfig cannot be read with your own rights")
            .caused_by(&error))
    });
    picked.map_err(|failure| {
        let is_denied = failure.causes.iter().any(|cause| cause.contains("Permission denied"));
        if !(is_denied && invoker.is_under_root()) {
            return failure;
        }
        failure.help(format!(
            "under sudo it is read with the rights of whoever called it: uid {}, gid {}\nas root itself: sudo env -u SUDO_UID tpd ...",
            invoker.uid, invoker.gid
        ))
    })
}

fn pick(files: Vec<PathBuf>, context: Option<&str>) -> Result<Target, Failure> {
    let kubeconfig = read(&files)?;
    let context = choose(&kubeconfig, context)?;
    let unusable =
        || Failure::new(ExitCode::Kubeconfig, format!("context {context:?} of the kubeconfig is not usable"));
    let see = || "see it with: kubectl config view --minify --context ".to_owned() + &context;
    let options = KubeConfigOptions { context: Some(context.clone()), ..KubeConfigOptions::default() };
    // It only looks as if it could wait.
    let config = Config::from_custom_kubeconfig(kubeconfig, &options).now_or_never();
    let mut config =
        config.ok_or_else(unusable)?.map_err(|error| unusable().caused_by(&error).help(see()))?;
    // The library's own retries can last a quarter of an hour; every call here has a time-out of its own.
    config.default_retry = false;
    if let Some(provider) = runs_a_program(&config.auth_info) {
        return Err(unusable()
            .because(format!("it logs in by the auth provider {provider:?}, which Kubernetes has given up"))
            .help("use the provider's credential plugin (exec), as kubectl does since 1.26"));
    }
    let plugin = config.auth_info.exec.take();
    let token_file = config.auth_info.token_file.take().filter(|_| config.auth_info.token.is_none());
    take_in(&mut config.auth_info)?;
    Ok(Target {
        context,
        server: config.cluster_url.to_string().trim_end_matches('/').to_owned(),
        namespace: config.default_namespace.clone(),
        config,
        plugin,
        token_file: token_file.map(PathBuf::from),
        files,
    })
}

/// The auth provider that the library would run a program for, as whoever it runs itself: root, where all others are run as the invoker.
/// That of OIDC is a token, and nothing else.
fn runs_a_program(auth: &AuthInfo) -> Option<&str> {
    auth.auth_provider.as_ref().map(|provider| provider.name.as_str()).filter(|name| *name != "oidc")
}

/// Has the contents of the files that are named in place of their names: the library would read them again for each connection.
fn take_in(auth: &mut AuthInfo) -> Result<(), Failure> {
    if let Some(path) = auth.client_certificate.take()
        && auth.client_certificate_data.is_none()
    {
        auth.client_certificate_data = Some(base64(&named(&path)?));
    }
    if let Some(path) = auth.client_key.take()
        && auth.client_key_data.is_none()
    {
        auth.client_key_data = Some(base64(&named(&path)?).into());
    }
    Ok(())
}

fn named(path: &str) -> Result<Vec<u8>, Failure> {
    fs::read(path).map_err(|error| {
        Failure::new(ExitCode::Kubeconfig, format!("{path}, which the kubeconfig names, cannot be read"))
            .caused_by(&error)
    })
}

/// Merges the files; the first to set a value wins.
fn read(files: &[PathBuf]) -> Result<Kubeconfig, Failure> {
    files.iter().try_fold(Kubeconfig::default(), |merged, path| {
        Kubeconfig::read_from(path).and_then(|next| merged.merge(next)).map_err(|error| {
            Failure::new(ExitCode::Kubeconfig, format!("kubeconfig {} cannot be read", path.display()))
                .caused_by(&error)
                .help("kubectl config view shows whether kubectl can read it")
        })
    })
}

fn choose(kubeconfig: &Kubeconfig, wanted: Option<&str>) -> Result<String, Failure> {
    let mut known: Vec<_> = kubeconfig.contexts.iter().map(|context| context.name.as_str()).collect();
    known.sort_unstable();
    let contexts =
        if known.is_empty() { "it has none".to_owned() } else { format!("it has: {}", known.join(", ")) };
    let current = kubeconfig.current_context.as_deref().filter(|name| !name.is_empty());
    let Some(name) = wanted.or(current) else {
        return Err(Failure::new(ExitCode::Kubeconfig, "the kubeconfig names no current context")
            .because(contexts)
            .help("name one with --context NAME, or choose one with: kubectl config use-context NAME"));
    };
    if !known.contains(&name) {
        return Err(Failure::new(ExitCode::Kubeconfig, format!("the kubeconfig has no context {name:?}"))
            .because(contexts)
            .help("name one of them with --context NAME"));
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const ONE: &str = "
apiVersion: v1
kind: Config
current-context: one
clusters: [{name: one, cluster: {server: 'https://one.example:6443'}}]
users: [{name: ann, user: {token: t}}]
contexts: [{name: one, context: {cluster: one, user: ann, namespace: shop}}]
";
    const TWO: &str = "
apiVersion: v1
kind: Config
current-context: two
clusters: [{name: two, cluster: {server: 'https://two.example'}}]
users: [{name: bob, user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: ./plugin, interactiveMode: Never}}}]
contexts: [{name: two, context: {cluster: two, user: bob}}]
";

    /// For root alone; names files that are.
    const LOCKED: &str = "
apiVersion: v1
kind: Config
current-context: locked
clusters: [{name: one, cluster: {server: 'https://one.example'}}]
users:
- {name: token, user: {tokenFile: token}}
- {name: certificate, user: {client-certificate: token, client-key: token}}
- {name: gcp, user: {auth-provider: {name: gcp, config: {cmd-path: /bin/touch, cmd-args: DIRECTORY/ran}}}}
contexts:
- {name: token, context: {cluster: one, user: token}}
- {name: certificate, context: {cluster: one, user: certificate}}
- {name: gcp, context: {cluster: one, user: gcp}}
";

    fn directory(name: &str) -> PathBuf {
        let path = env::temp_dir().join(format!("tpd-config-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("one"), ONE).unwrap();
        fs::write(path.join("two"), TWO).unwrap();
        path
    }

    fn invoker(directory: &Path, kubeconfig: &str) -> Invoker {
        Invoker {
            uid: 1000,
            gid: 1000,
            environment: [("KUBECONFIG".to_owned(), kubeconfig.to_owned())].into(),
            directory: directory.to_owned(),
        }
    }

    #[tokio::test]
    async fn a_list_with_relative_and_missing_files_is_merged() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let directory = directory("merge");
        let files = files(&invoker(&directory, "missing:one::two"), None).unwrap();
        assert_eq!(files, [directory.join("one"), directory.join("two")]);

        let target = load(&files, None).await.unwrap();
        assert_eq!((target.context.as_str(), target.namespace.as_str()), ("one", "shop"));
        assert_eq!(target.server, "https://one.example:6443");

        let other = load(&files, Some("two")).await.unwrap();
        let plugin = other.plugin.unwrap();
        assert_eq!(plugin.command, Some(directory.join("./plugin").display().to_string()));
        assert!(other.config.auth_info.exec.is_none());
        fs::remove_dir_all(directory).unwrap();
    }

    #[tokio::test]
    async fn an_unknown_context_lists_the_known_ones() {
        let directory = directory("unknown");
        let files = files(&invoker(&directory, "two:one"), None).unwrap();
        let failure = load(&files, Some("three")).await.unwrap_err();
        assert_eq!(failure.code, ExitCode::Kubeconfig);
        assert_eq!(failure.causes, ["it has: one, two"]);
        fs::remove_dir_all(directory).unwrap();
    }

    /// Only root has files that others may not read.
    #[tokio::test]
    async fn what_root_alone_may_read_is_not_read_for_others() {
        use std::os::unix::fs::PermissionsExt as _;

        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = directory("rights");
        let lock = |name: &str, mode| {
            fs::set_permissions(directory.join(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        fs::write(directory.join("token"), "secret").unwrap();
        fs::write(directory.join("locked"), LOCKED).unwrap();
        lock("token", 0o600);
        let ann = invoker(&directory, "locked");
        let paths = files(&ann, None).unwrap();
        let failure = load_for(&ann, &paths, Some("certificate")).await.unwrap_err();
        assert_eq!(failure.code, ExitCode::Kubeconfig);
        assert!(failure.error.contains("/token, which the kubeconfig names, cannot be read"), "{failure}");
        let target = load_for(&ann, &paths, Some("token")).await.unwrap();
        assert_eq!(target.token_file, Some(directory.join("token")));
        assert!(target.config.auth_info.token_file.is_none(), "the library would read it as root");

        lock("locked", 0o600);
        let failure = load_for(&ann, &paths, Some("token")).await.unwrap_err();
        assert_eq!(failure.code, ExitCode::Kubeconfig);
        assert!(failure.help.unwrap().contains("uid 1000"));
        lock("", 0o700);
        assert!(files(&ann, None).is_err());
        fs::remove_dir_all(directory).unwrap();
    }

    #[tokio::test]
    async fn an_auth_provider_that_would_run_a_program_is_refused() {
        let directory = directory("provider");
        let text = LOCKED.replace("DIRECTORY", &directory.display().to_string());
        fs::write(directory.join("gcp"), text).unwrap();
        let failure = load(&[directory.join("gcp")], Some("gcp")).await.unwrap_err();
        assert!(failure.causes[0].contains("auth provider \"gcp\""), "{failure}");
        assert!(!directory.join("ran").exists());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn no_file_at_all_says_where_it_looked() {
        let failure = files(&invoker(Path::new("/nowhere"), "a:b"), None).unwrap_err();
        assert_eq!(failure.code, ExitCode::Kubeconfig);
        assert_eq!(failure.causes, ["looked for /nowhere/a, /nowhere/b"]);
    }
}
