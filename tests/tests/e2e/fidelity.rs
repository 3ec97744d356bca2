//! Traffic through tpd behaves as on a network: what is refused is refused, what is sent arrives, and nothing else.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use tpd_tests::{Held, Laptop, Outcome, Probe, attempt, pause};

use crate::samples::{PATHS, echo, echo_addresses, echo_pod};

/// `refused` comes with the first round trip; this is many of them on a busy machine.
const AT_ONCE: Duration = Duration::from_millis(300);

const GIGABYTE: u64 = 1 << 30;

#[test]
fn a_refused_port_is_refused_at_once() {
    let laptop = Laptop::take();
    let everywhere = [echo_addresses(&laptop), echo_pod(&laptop)].concat();
    for path in PATHS {
        let _connection = laptop.up_over(path);
        for &address in &everywhere {
            let (outcome, took) =
                laptop.inside(|| attempt(SocketAddr::new(address, 81), Duration::from_secs(5)));
            assert_eq!(outcome, Outcome::Refused, "port 81 of {address} over {path:?}, after {took:?}");
            assert!(took < AT_ONCE, "port 81 of {address} over {path:?} is refused only after {took:?}");
            let (outcome, _) = laptop.inside(|| attempt(SocketAddr::new(address, 7), Duration::from_secs(5)));
            assert_eq!(outcome, Outcome::Connected, "port 7 of {address} over {path:?}");
        }
        let run = laptop.run("tpd-echo connect echo.shop:81");
        assert!(run.ok().out().starts_with("refused"), "{run}");
    }
}

#[test]
fn a_refused_datagram_is_refused_too() {
    let laptop = Laptop::take();
    let pod = echo_pod(&laptop);
    let _connection = laptop.up("");
    for address in pod {
        let refused = laptop.inside(|| {
            let socket = UdpSocket::bind(if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.connect((address, 81))?;
            socket.set_read_timeout(Some(Duration::from_secs(3)))?;
            socket.send(b"anybody?")?;
            socket.recv(&mut [0; 16])
        });
        let error = refused.expect_err("nobody answers on UDP port 81");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "UDP port 81 of {address}: {error}");
    }
}

#[test]
fn an_address_that_nobody_has_is_never_connected() {
    let laptop = Laptop::take();
    let nobody: [IpAddr; 4] = ["10.244.15.251", "fd00:10:244::fb", "10.96.200.200", "fd00:10:96::c8c8"]
        .map(|address| address.parse().unwrap());
    for path in PATHS {
        let _connection = laptop.up_over(path);
        for address in nobody {
            let (outcome, took) =
                laptop.inside(|| attempt(SocketAddr::new(address, 80), Duration::from_secs(6)));
            assert!(
                matches!(outcome, Outcome::Unreachable | Outcome::Timeout),
                "{address}, which nobody has, is {outcome:?} over {path:?} after {took:?}"
            );
        }
    }
}

#[test]
fn a_port_that_a_service_does_not_have_is_never_connected() {
    let laptop = Laptop::take();
    let service = echo_addresses(&laptop);
    let _connection = laptop.up("");
    for address in service {
        let (outcome, took) =
            laptop.inside(|| attempt(SocketAddr::new(address, 4444), Duration::from_secs(6)));
        assert!(
            !matches!(outcome, Outcome::Connected | Outcome::ConnectedThenClosed),
            "port 4444 of {address}, which the Service does not have, is {outcome:?} after {took:?}"
        );
    }
}

#[test]
fn either_end_may_close_its_half_first() {
    let laptop = Laptop::take();
    for path in PATHS {
        let _connection = laptop.up_over(path);
        // The client closes its half, and everything comes back after that.
        laptop.run("tpd-echo echo echo.shop:7 10000000").ok();
        laptop.run("tpd-echo echo echo.shop:7 0").ok();
        laptop.run("tpd-echo echo echo.shop:7 1").ok();
        // The server closes its half, and reads what the client says after that.
        laptop.run("tpd-echo receive echo.shop:19 10000000").ok();
        laptop.run("tpd-echo receive echo.shop:19 0").ok();
        laptop.run("tpd-echo send echo.shop:9 0").ok();
    }
}

#[test]
fn a_reset_comes_through() {
    let laptop = Laptop::take();
    let _connection = laptop.up("");
    let echo = echo(&laptop, 7);
    let gone = laptop.inside(|| -> std::io::Result<usize> {
        let mut stream = TcpStream::connect_timeout(&echo, Duration::from_secs(5))?;
        stream.write_all(b"here")?;
        stream.read_exact(&mut [0; 4])?;
        // With its pod killed, the other end has no connection by that name any more.
        laptop.cluster.kubectl("-n shop delete pod -l app=echo --force --grace-period=0 --wait=false").ok();
        stream.set_read_timeout(Some(Duration::from_secs(15)))?;
        stream.read(&mut [0; 1])
    });
    let ended = match &gone {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    };
    laptop.cluster.kubectl("-n shop rollout status deployment/echo").ok();
    assert!(ended, "a connection whose pod was killed ended with {gone:?}");
}

#[test]
fn large_datagrams_arrive_whole() {
    let laptop = Laptop::take();
    let addresses = echo_addresses(&laptop);
    for path in PATHS {
        let _connection = laptop.up_over(path);
        for &address in &addresses {
            let echo = SocketAddr::new(address, 7);
            for size in [0, 1, 1200, 1372, 1373, 1500, 9000, 60_000, 65_000] {
                let run = laptop.run(&format!("tpd-echo udp {echo} {size} 20"));
                assert!(run.code == Some(0), "datagrams of {size} bytes to {echo} over {path:?}:\n{run}");
            }
        }
    }
}

#[test]
fn a_thousand_connections_at_once() {
    let laptop = Laptop::take();
    for path in PATHS {
        let _connection = laptop.up_over(path);
        let run = laptop.run("tpd-echo many echo.shop:7 1000");
        assert!(run.code == Some(0), "over {path:?}:\n{run}");
        println!("{path:?}: {}", run.out());
    }
}

#[test]
fn a_gigabyte_each_way_arrives_byte_for_byte() {
    let laptop = Laptop::take();
    for path in PATHS {
        let _connection = laptop.up_over(path);
        for transfer in ["send echo.shop:9", "receive echo.shop:19"] {
            let script = format!("tpd-echo {transfer} {GIGABYTE}");
            let run = laptop.script(&script).limit(Duration::from_secs(180)).run();
            assert!(run.code == Some(0), "{transfer} over {path:?}:\n{run}");
            println!("{path:?} {transfer}: {}", run.out());
        }
    }
}

#[test]
fn both_ways_at_once_too() {
    let laptop = Laptop::take();
    for path in PATHS {
        let _connection = laptop.up_over(path);
        let size = GIGABYTE / 8;
        let transfers: Vec<_> = ["send echo.shop:9", "receive echo.shop:19", "echo echo.shop:7"]
            .iter()
            .flat_map(|transfer| [transfer; 3])
            .map(|transfer| {
                laptop.script(&format!("tpd-echo {transfer} {size}")).limit(Duration::from_secs(120)).start()
            })
            .collect();
        for transfer in transfers {
            transfer.finish().ok();
        }
    }
}

#[test]
fn ping_works_in_both_families() {
    let laptop = Laptop::take();
    let pod = echo_pod(&laptop);
    for path in PATHS {
        let _connection = laptop.up_over(path);
        for address in &pod {
            laptop
                .run(&format!("ping -c 3 -i 0.2 -W 2 {address}"))
                .ok()
                .says(&["3 received", " 0% packet loss"]);
            laptop.run(&format!("ping -c 2 -i 0.2 -W 2 -s 8000 {address}")).ok().says(&[" 0% packet loss"]);
        }
        laptop.run("ping -c 1 -W 2 ring-0.ring.shop").ok();
    }
}

#[test]
fn a_service_whose_pods_are_replaced_goes_on() {
    let laptop = Laptop::take();
    let _connection = laptop.up("--namespace shop");
    let gone = laptop.cluster.pods("shop", "app=web").concat();
    laptop.cluster.kubectl("-n shop rollout restart deployment/web").ok();
    let mut failures = Vec::new();
    let rollout = laptop
        .cluster
        .machine("tests/kubernetes/cluster kubectl -n shop rollout status deployment/web --timeout=120s");
    let mut rollout = rollout.limit(Duration::from_secs(130)).start();
    let mut requests = 0;
    while !rollout.ended() {
        let run = laptop.run("curl -sS --max-time 2 http://web");
        requests += 1;
        if run.code != Some(0) {
            failures.push(run.stderr);
        }
    }
    rollout.finish().ok();
    // A pod that is going away may refuse a few before every node knows, with or without tpd.
    assert!(
        failures.len() * 10 <= requests,
        "{} of {requests} requests failed: {failures:?}",
        failures.len()
    );
    laptop.cluster.forgets("shop", "app=web", &gone);
    for _ in 0..50 {
        laptop.run("curl -sS --max-time 2 http://web").ok().says(&["Hello from web-"]);
    }
}

#[test]
fn a_program_that_stops_reading_stalls_nobody_else() {
    let laptop = Laptop::take();
    let addresses = (echo(&laptop, 19), echo(&laptop, 7));
    for path in PATHS {
        let _connection = laptop.up_over(path);
        let (source, echo) = addresses;
        // Each asks for a gigabyte and reads nothing of it.
        let stalled: Vec<TcpStream> = laptop.inside(|| {
            (0..30)
                .map(|_| {
                    let mut stream =
                        TcpStream::connect_timeout(&source, Duration::from_secs(5)).expect("the source");
                    stream.write_all(format!("{GIGABYTE}\n").as_bytes()).expect("a line");
                    stream
                })
                .collect()
        });
        pause(Duration::from_secs(2));
        let held = Held::start(&laptop, echo);
        let probe = Probe::start(&laptop, echo);
        pause(Duration::from_secs(3));
        let (attempts, failures) = probe.count();
        let gap = held.longest_gap();
        assert!(
            failures.is_empty(),
            "{} of {attempts} connections beside stalled ones: {failures:?}",
            failures.len()
        );
        assert!(
            gap < Duration::from_millis(300),
            "beside stalled connections an echo takes {gap:?} over {path:?}"
        );
        laptop.run("tpd-echo send echo.shop:9 100000000").ok();
        drop(stalled);
    }
}
