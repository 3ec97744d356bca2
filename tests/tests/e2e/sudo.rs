//! Under sudo, the kubeconfig, its credential plugins and the daemon are those of the person who called it.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tpd_api::exit::ExitCode;
use tpd_tests::Laptop;

/// A user of the laptop, who is nobody on the machine.
const UID: u32 = 4711;

/// A group of that user's, beside the own one.
const GROUP: u32 = 4712;

/// The home of that user, with a kubeconfig whose credentials a plugin hands out.
struct Home(String);

impl Home {
    fn create(laptop: &Laptop) -> Self {
        let home = Self(format!("/tmp/tpd-e2e-{}", std::process::id()));
        laptop
            .run(&format!(
                "sed -i /^ann:/d /etc/passwd; echo ann:x:{UID}:{UID}::{}:/bin/sh >>/etc/passwd; \
                 sed -i /^cards:/d /etc/group; echo cards:x:{GROUP}:ann >>/etc/group",
                home.0
            ))
            .ok();
        fs::create_dir_all(format!("{}/.kube", home.0)).expect("/tmp can be written");
        let developer = laptop.run("kubectl config view --raw --minify -o json");
        let mut config: Value = serde_json::from_str(developer.ok().out()).expect("kubectl prints JSON");
        let user = config["users"][0]["user"].clone();
        let credential = json!({
            "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
            "status": {
                "clientCertificateData": pem(laptop, &user["client-certificate-data"]),
                "clientKeyData": pem(laptop, &user["client-key-data"]),
            },
        });
        home.write("credential.json", &credential.to_string());
        home.write("login.sh", "#!/bin/sh\necho \"$(id -u) $(id -G) $HOME ${CLOUD_PROFILE-none}\" >\"${0%/*}/called\"\nexec cat \"${0%/*}/credential.json\"\n");
        config["users"][0]["user"] = json!({ "exec": {
            "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Never", "command": "../login.sh" } });
        home.write(".kube/config", &config.to_string());
        laptop
            .run(&format!("chmod 755 {0}/login.sh && chown -R {UID}:{UID} {0} && chmod 700 {0}", home.0))
            .ok();
        home
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(Path::new(&self.0).join(name), text).expect("/tmp can be written");
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn pem(laptop: &Laptop, data: &Value) -> String {
    let data = data.as_str().expect("the developer's kubeconfig holds a certificate");
    let run = laptop.script("base64 -d").input(data).run();
    run.ok().stdout.clone()
}

#[test]
fn the_invokers_kubeconfig_plugin_and_environment_count() {
    let laptop = Laptop::take();
    let home = Home::create(&laptop);
    // What sudo leaves of the environment.
    let sudo = format!(
        "env -u KUBECONFIG HOME=/root SUDO_USER=ann SUDO_UID={UID} SUDO_GID={UID} CLOUD_PROFILE=blue"
    );
    laptop.run(&format!("{sudo} tpd up --namespace shop")).ok();
    let status = laptop.run("tpd status");
    let ann = format!("setpriv --reuid={UID} --regid={UID} --clear-groups");
    let own = laptop.run(&format!("{ann} tpd status"));
    let nobody = laptop.run("setpriv --reuid=65534 --regid=65534 --clear-groups tpd status");
    let logs = laptop.run(&format!("{ann} tpd logs"));
    let web = laptop.run("curl -sS --max-time 2 http://web");
    let down = laptop.run(&format!("{ann} tpd down"));
    let called = fs::read_to_string(format!("{}/called", home.0));
    let _ = laptop.run("tpd down");

    assert_eq!(
        called.expect("the credential plugin was run").trim(),
        format!("{UID} {UID} {GROUP} {} blue", home.0)
    );
    status.ok().says(&["user", "dev"]);
    own.ok();
    logs.ok();
    web.ok();
    nobody.exits(ExitCode::Privilege);
    down.ok();
}
