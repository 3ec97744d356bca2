use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::sleep;
use tpd_api::agent::Mode;

use super::PATIENCE;
use crate::agent::proxy::rules::tests::{counts, rule};
use crate::agent::proxy::tests::{Far, Stage, filtered, play, unfiltered};
use crate::agent::proxy::{Refusal, held};

const NO_CONTENT: &str = "HTTP/1.1 204 No Content\r\n\r\n";

/// A request, and what a laptop gets of it.
fn request(start: &str, rest: &str) -> (String, String) {
    (format!("{start}\r\n\r\n{rest}"), format!("{start}\r\nX-Forwarded-For: 10.0.0.9\r\n\r\n{rest}"))
}

async fn exchange(client: &mut Far, request: &str, server: &mut Far, as_it_comes: &str, answer: &str) {
    client.send(request).await;
    server.expect(as_it_comes).await;
    server.send(answer).await;
    client.expect(answer).await;
}

#[test]
fn pipelined_requests_choose_their_sides_and_answers_keep_their_order() {
    play(async {
        let (rules, counters) = filtered();
        let mut stage = Stage::new(rules);
        let dev = |number| request(&format!("GET /{number} HTTP/1.1\r\nx-dev: a"), "");
        let other = |number| format!("GET /{number} HTTP/1.1\r\nx-dev: b\r\n\r\n");
        let all = [dev(1).0, other(2), dev(3).0, dev(4).0, other(5)].concat();
        stage.client.send(all).await;
        let answer = |number| format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n{number}");
        let mut laptop = stage.laptop().await;
        laptop.expect(dev(1).1).await;
        laptop.send(answer(1)).await;
        let mut app = stage.app().await;
        app.expect(other(2)).await;
        app.send(answer(2)).await;
        laptop.expect(dev(3).1).await;
        laptop.send(answer(3)).await;
        laptop.expect(dev(4).1).await;
        laptop.send(answer(4)).await;
        app.expect(other(5)).await;
        app.send(answer(5)).await;
        stage.client.expect([answer(1), answer(2), answer(3), answer(4), answer(5)].concat()).await;
        assert!(stage.nothing_was_dialled());
        assert_eq!(counts(&counters), [3, 2, 0, 0]);
        stage.client.end().await;
        app.expect_end().await;
        laptop.expect_end().await;
    });
}

#[test]
fn rules_count_from_the_next_request_on() {
    play(async {
        let mut stage = Stage::new(vec![]);
        let (plain, forwarded) = request("GET / HTTP/1.1", "");
        stage.client.send(&plain).await;
        let mut app = stage.app().await;
        app.expect(&plain).await;
        stage.port.replace(unfiltered().0);
        app.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        stage.client.send(&plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        stage.port.replace(vec![]);
        laptop.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        exchange(&mut stage.client, &plain, &mut app, &plain, NO_CONTENT).await;
    });
}

#[test]
fn bodies_of_every_framing_go_through_as_they_came() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        stage.client.send("HEAD / HTTP/1.1\r\n\r\n").await;
        let mut app = stage.app().await;
        app.expect("HEAD / HTTP/1.1\r\n\r\n").await;
        app.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n").await;
        stage.client.expect("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n").await;
        let chunks = "5;ext=\"1\"\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n";
        let post = format!("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}");
        let answer = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{chunks}");
        exchange(&mut stage.client, &post, &mut app, &post, &answer).await;
        let put = "PUT / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
        exchange(&mut stage.client, put, &mut app, put, "HTTP/1.1 304 Not\r\nContent-Length: 9\r\n\r\n")
            .await;
        let get = "GET / HTTP/1.1\r\nx-dev: b\r\n\r\n";
        stage.client.send(get).await;
        app.expect(get).await;
        app.send("HTTP/1.1 200 OK\r\n\r\nuntil the end").await;
        app.end().await;
        assert_eq!(stage.client.rest().await, b"HTTP/1.1 200 OK\r\n\r\nuntil the end");
    });
}

#[test]
fn large_bodies_flow_both_ways_at_once() {
    play(async {
        let mut stage = Stage::new(unfiltered().0);
        let body = "x".repeat(1 << 20);
        let (plain, forwarded) =
            request(&format!("POST / HTTP/1.1\r\nContent-Length: {}", body.len()), &body);
        stage.client.send(&plain[..100]).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded[..90]).await;
        // The answer begins long before the request has ended.
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        laptop.send(&answer).await;
        stage.client.expect(&answer).await;
        let (mut from_client, mut to_client) = tokio::io::split(&mut stage.client.stream);
        let (mut from_laptop, mut to_laptop) = tokio::io::split(&mut laptop.stream);
        let (mut request, mut answer) = (vec![0; forwarded.len() - 90], vec![0; body.len()]);
        let (sent, got, answered, heard) = tokio::join!(
            to_client.write_all(&plain.as_bytes()[100..]),
            from_laptop.read_exact(&mut request),
            to_laptop.write_all(body.as_bytes()),
            from_client.read_exact(&mut answer),
        );
        sent.and(answered).and(got).and(heard).unwrap();
        assert!(request == forwarded.as_bytes()[90..] && answer == body.as_bytes());
    });
}

#[test]
fn interim_answers_and_expectations_work() {
    play(async {
        let mut stage = Stage::new(unfiltered().0);
        let (head, forwarded) = request("POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3", "");
        stage.client.send(&head).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        laptop.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        stage.client.expect("HTTP/1.1 100 Continue\r\n\r\n").await;
        stage.client.send("abc").await;
        laptop.expect("abc").await;
        let answers =
            "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
        laptop.send(answers).await;
        stage.client.expect(answers).await;
        let (plain, forwarded) = request("GET / HTTP/1.1", "");
        exchange(&mut stage.client, &plain, &mut laptop, &forwarded, NO_CONTENT).await;
    });
}

#[test]
fn an_upgrade_becomes_bytes_both_ways_with_the_side_that_made_it() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        let head = "GET /ws HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nx-dev: a";
        let (plain, forwarded) = request(head, "");
        stage.client.send(&plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        let switching = "HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n\x01\x02";
        laptop.send(switching).await;
        stage.client.expect(switching).await;
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        laptop.expect("GET / HTTP/1.1\r\n\r\n").await;
        laptop.send("\x03").await;
        stage.client.expect("\x03").await;
        laptop.end().await;
        stage.client.expect_end().await;
        assert!(stage.nothing_was_dialled());

        let mut stage = Stage::new(filtered().0);
        stage.client.send("CONNECT a:1 HTTP/1.1\r\n\r\nearly").await;
        let mut app = stage.app().await;
        app.expect("CONNECT a:1 HTTP/1.1\r\n\r\n").await;
        app.send("HTTP/1.1 200 OK\r\n\r\n").await;
        app.expect("early").await;
    });
}

#[test]
fn an_offer_of_http2_does_not_lead_past_the_filter() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        let start = |offer: &str| {
            format!(
                "GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: {offer}\r\nHTTP2-Settings: AA"
            )
        };
        let (offered, masked) = (start("h2c"), start("x2c"));
        let mut client = stage.take_client();
        client.send(format!("{offered}\r\n\r\n")).await;
        let mut app = stage.app().await;
        app.expect(format!("{masked}\r\n\r\n")).await;
        app.send(NO_CONTENT).await;
        client.expect(NO_CONTENT).await;
        let (dev, _) = request(&format!("{offered}\r\nx-dev: a"), "");
        client.send(dev).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(request(&format!("{masked}\r\nx-dev: a"), "").1).await;

        // Without filters all goes where the first request does.
        stage.port.replace(unfiltered().0);
        let mut client = stage.another_client();
        let (plain, forwarded) = request(&offered, "");
        client.send(plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(forwarded).await;
        let switching = "HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\n\r\n\0\0\0\x04";
        laptop.send(switching).await;
        client.expect(switching).await;
    });
}

#[test]
fn a_laptop_that_refuses_costs_nothing() {
    play(async {
        let (rules, counters) = unfiltered();
        let mut stage = Stage::new(rules);
        stage.world.refusal.set(Some(Refusal::Suspended));
        let (plain, forwarded) = request("POST / HTTP/1.1\r\nContent-Length: 2", "ab");
        stage.client.send(&plain).await;
        let mut app = stage.app().await;
        app.expect(&plain).await;
        app.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        stage.world.refusal.set(None);
        stage.client.send(&plain).await;
        stage.laptop().await.expect(&forwarded).await;
        sleep(Duration::from_millis(600)).await;
        assert_eq!(counts(&counters), [1, 0, 1, 0]);
    });
}

#[test]
fn what_a_laptop_never_acknowledged_goes_to_the_app() {
    play(async {
        let (rules, counters) = unfiltered();
        let mut stage = Stage::new(rules);
        stage.world.unheard.set(true);
        let (plain, _) = request("POST / HTTP/1.1\r\nContent-Length: 4", "ab");
        stage.client.send(&plain).await;
        let _laptop = stage.laptop().await;
        let mut app = stage.app().await;
        app.expect(&plain).await;
        stage.client.send("cd").await;
        app.expect("cd").await;
        app.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        assert_eq!(counts(&counters), [0, 0, 1, 0]);
        assert_eq!(stage.world.lost.get(), 1);
    });
}

#[test]
fn a_laptop_that_is_left_out_is_not_asked_on_a_kept_connection() {
    play(async {
        let (rules, counters) = unfiltered();
        let mut stage = Stage::new(rules);
        let (plain, forwarded) = request("POST / HTTP/1.1\r\nContent-Length: 2", "ab");
        stage.client.send(&plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        laptop.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        stage.world.refusal.set(Some(Refusal::Suspended));
        stage.client.send(&plain).await;
        let mut app = stage.app().await;
        app.expect(&plain).await;
        app.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        assert_eq!(laptop.rest().await, b"");
        assert_eq!(counts(&counters), [1, 0, 1, 0]);
    });
}

#[test]
fn a_kept_connection_that_was_closing_is_replaced() {
    play(async {
        let (rules, counters) = unfiltered();
        let mut stage = Stage::new(rules);
        let (plain, forwarded) = request("POST / HTTP/1.1\r\nContent-Length: 2", "ab");
        stage.client.send(&plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        laptop.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        // In between: it is dialled again.
        drop(laptop);
        stage.client.send(&plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        laptop.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        // While the request is under way: the app has it.
        stage.client.send(&plain).await;
        laptop.expect(&forwarded).await;
        drop(laptop);
        stage.app().await.expect(&plain).await;
        assert_eq!(counts(&counters), [2, 0, 1, 0]);
    });
}

#[test]
fn half_an_answer_of_a_laptop_never_looks_whole() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n",
        "HTTP/1.1 200 OK\r\nConte",
    ] {
        play(async {
            let mut stage = Stage::new(unfiltered().0);
            stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
            let mut laptop = stage.laptop().await;
            laptop.send(answer).await;
            drop(laptop);
            stage.client.expect_reset().await;
        });
    }
}

/// Answers whose ends some parsers would find elsewhere than others, or nowhere.
const UNCLEAR: [&str; 5] = [
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2 \r\nok\r\n0\r\n\r\n",
    "HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "what?\r\n",
];

#[test]
fn a_laptop_whose_answer_is_unclear_gets_nothing_that_comes_after_its_request() {
    for answer in UNCLEAR {
        play(async {
            let mut stage = Stage::new(filtered().0);
            let (plain, forwarded) = request("GET / HTTP/1.1\r\nx-dev: a", "");
            stage.client.send(&plain).await;
            let mut laptop = stage.laptop().await;
            laptop.expect(&forwarded).await;
            laptop.send(answer).await;
            stage.client.expect(answer).await;
            laptop.send("more").await;
            stage.client.expect("more").await;
            // Another's, over the same connection, if the client is a proxy: it has to come again.
            stage.client.send("GET / HTTP/1.1\r\nx-dev: b\r\n\r\n").await;
            stage.client.expect_end().await;
            laptop.expect_end().await;
            assert!(stage.nothing_was_dialled());
        });
    }
}

#[test]
fn an_unclear_answer_of_a_laptop_is_whole_when_the_laptop_ends_it() {
    for answer in UNCLEAR {
        play(async {
            let mut stage = Stage::new(filtered().0);
            let (plain, forwarded) = request("GET / HTTP/1.1\r\nx-dev: a", "");
            // What was asked before the answer came cuts nothing off.
            stage.client.send(format!("{plain}GET / HTTP/1.1\r\n\r\n")).await;
            let mut laptop = stage.laptop().await;
            laptop.expect(&forwarded).await;
            laptop.send(answer).await;
            stage.client.expect(answer).await;
            laptop.send("more").await;
            laptop.end().await;
            stage.client.expect("more").await;
            stage.client.expect_end().await;
            laptop.expect_end().await;
            assert!(stage.nothing_was_dialled());
        });
    }
}

#[test]
fn after_an_unclear_answer_of_the_app_all_goes_to_the_app() {
    for answer in UNCLEAR {
        play(async {
            let mut stage = Stage::new(filtered().0);
            let get = "GET / HTTP/1.1\r\n\r\n";
            stage.client.send(get).await;
            let mut app = stage.app().await;
            app.expect(get).await;
            app.send(answer).await;
            stage.client.expect(answer).await;
            let dev = "GET / HTTP/1.1\r\nx-dev: a\r\n\r\n";
            exchange(&mut stage.client, dev, &mut app, dev, NO_CONTENT).await;
            assert!(stage.nothing_was_dialled());
        });
    }
}

#[test]
fn half_an_answer_of_the_app_ends_as_it_does() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        let mut app = stage.app().await;
        app.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel").await;
        app.end().await;
        stage.client.expect("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel").await;
        stage.client.expect_end().await;
    });
}

#[test]
fn a_new_laptop_that_dies_with_a_request_it_took_is_not_asked_twice() {
    play(async {
        let mut stage = Stage::new(unfiltered().0);
        let (plain, forwarded) = request("POST / HTTP/1.1\r\nContent-Length: 2", "ab");
        stage.client.send(&plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        drop(laptop);
        stage.client.expect_reset().await;

        let mut stage = Stage::new(unfiltered().0);
        let (plain, forwarded) = request("GET / HTTP/1.1", "");
        stage.client.send(&plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        drop(laptop);
        stage.app().await.expect(&plain).await;
    });
}

#[test]
fn what_could_be_read_in_two_ways_goes_to_the_app_as_it_came() {
    for smuggled in [
        "POST / HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\nx-dev: a\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 4\r\nContent-Length: 0\r\n\r\nGET / HTTP/1.1\r\nx-dev: a\r\n\r\n",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5 \r\nhello\r\n0\r\n\r\nGET / HTTP/1.1\r\nx-dev: a\r\n\r\n",
        "GET / HTTP/1.1\r\nA: b\r\n x-dev: a\r\n\r\n",
        "GET / HTTP/1.1\r\nx-dev: a\nb: c\r\n\r\n",
        "GET / HTTP/1.1\r\nx-dev : a\r\n\r\n",
    ] {
        play(async {
            let mut stage = Stage::new(filtered().0);
            let first = "GET /first HTTP/1.1\r\n\r\n";
            stage.client.send(first).await;
            let mut app = stage.app().await;
            app.expect(first).await;
            app.send(NO_CONTENT).await;
            stage.client.expect(NO_CONTENT).await;
            stage.client.send(smuggled).await;
            app.expect(smuggled).await;
            // Even what is plain again.
            stage.client.send("GET / HTTP/1.1\r\nx-dev: a\r\n\r\n").await;
            app.expect("GET / HTTP/1.1\r\nx-dev: a\r\n\r\n").await;
            assert!(stage.nothing_was_dialled());
        });
    }
}

#[test]
fn a_laptops_request_with_a_bad_chunk_goes_to_the_app_or_nowhere() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        let head = "POST / HTTP/1.1\r\nx-dev: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        stage.client.send(head).await;
        let _laptop = stage.laptop().await;
        stage.client.send("x\r\n").await;
        stage.app().await.expect(format!("{head}x\r\n")).await;
    });
}

#[test]
fn a_bad_chunk_for_the_app_repeats_nothing() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        let mut app = stage.app().await;
        app.expect("GET / HTTP/1.1\r\n\r\n").await;
        app.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        let head = "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
        stage.client.send(head).await;
        app.expect(head).await;
        stage.client.send("x\r\n").await;
        stage.client.end().await;
        assert_eq!(app.rest().await, b"x\r\n");
    });
}

#[test]
fn what_cannot_be_sent_again_is_not_kept_once_it_has_arrived() {
    for (method, is_kept) in [("POST", false), ("PUT", true)] {
        play(async {
            let mut stage = Stage::new(unfiltered().0);
            let body = "x".repeat(15_000);
            let (plain, forwarded) =
                request(&format!("{method} / HTTP/1.1\r\nContent-Length: {}", body.len()), &body);
            let mut client = stage.take_client();
            client.send(&plain).await;
            let mut laptop = stage.laptop().await;
            laptop.expect(&forwarded).await;
            assert!(held() >= body.len());
            sleep(2 * PATIENCE).await;
            assert_eq!(held() >= body.len(), is_kept);
            laptop.send(NO_CONTENT).await;
            client.expect(NO_CONTENT).await;
        });
    }
}

#[test]
fn heads_that_are_too_large_go_to_the_app_as_they_came() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        let head = format!("GET / HTTP/1.1\r\nx-dev: a\r\nx: {}\r\n\r\n", "y".repeat(70_000));
        stage.client.send(&head[..60_000]).await;
        let rest = async {
            stage.client.send(&head[60_000..]).await;
            stage.client.end().await;
        };
        let app = async { stage.apps.recv().await.unwrap().rest().await };
        let ((), got) = tokio::join!(rest, app);
        assert_eq!(got, head.as_bytes());
    });
}

#[test]
fn the_end_of_an_idle_app_reaches_the_client() {
    play(async {
        let mut stage = Stage::new(filtered().0);
        stage.client.send("GET / HTTP/1.1\r\n\r\n").await;
        let mut app = stage.app().await;
        app.expect("GET / HTTP/1.1\r\n\r\n").await;
        app.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        app.end().await;
        stage.client.expect_end().await;
    });
}

#[test]
fn the_last_answer_ends_the_connection() {
    play(async {
        let mut stage = Stage::new(unfiltered().0);
        let (plain, forwarded) = request("GET / HTTP/1.1\r\nConnection: close", "");
        stage.client.send(&plain).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        laptop.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        assert_eq!(stage.client.rest().await, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
    });
}

#[test]
fn taps_get_whole_requests_and_lose_whole_requests() {
    play(async {
        let (tap, counters) = rule("tap", Some("a"), Mode::Wiretap);
        let mut stage = Stage::new(vec![tap]);
        let (plain, forwarded) = request("POST / HTTP/1.1\r\nx-dev: a\r\nContent-Length: 2", "ab");
        stage.client.send(&plain).await;
        let mut app = stage.app().await;
        app.expect(&plain).await;
        app.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        let mut laptop = stage.laptop().await;
        laptop.expect(&forwarded).await;
        laptop.send("HTTP/1.1 500 Whatever\r\n\r\n").await;
        let other = "GET / HTTP/1.1\r\n\r\n";
        exchange(&mut stage.client, other, &mut app, other, NO_CONTENT).await;
        assert_eq!(counts(&counters), [1, 1, 0, 0]);

        // The laptop reads no more; its pipe and its queue fill, and then copies are lost, each as a whole.
        let body = "x".repeat(50_000);
        let head = format!("POST / HTTP/1.1\r\nx-dev: a\r\nContent-Length: {}", body.len());
        let (large, _) = request(&head, &body);
        for _ in 0..10 {
            let client = &mut stage.client;
            tokio::join!(client.send(&large), app.expect(&large));
            app.send(NO_CONTENT).await;
            stage.client.expect(NO_CONTENT).await;
        }
        let [_, _, _, lost] = counts(&counters);
        assert!((1..10).contains(&lost), "{lost}");
    });
}

#[test]
fn a_request_that_fails_open_is_copied_once() {
    play(async {
        let (all, _) = rule("a", None, Mode::Intercept);
        let (tap, _) = rule("tap", None, Mode::Wiretap);
        let mut stage = Stage::new(vec![all, tap]);
        let (plain, forwarded) = request("GET / HTTP/1.1", "");
        stage.client.send(&plain).await;
        // The tap's is dialled in another task, after that of the request.
        let (mut laptop, mut tap) = (stage.laptop().await, stage.laptop().await);
        laptop.expect(&forwarded).await;
        tap.expect(&forwarded).await;
        drop(laptop);
        let mut app = stage.app().await;
        app.expect(&plain).await;
        app.send(NO_CONTENT).await;
        stage.client.expect(NO_CONTENT).await;
        drop(stage.client);
        tap.expect_end().await;
    });
}

/// Answers every request with its path.
async fn serve(mut server: Far) -> Far {
    let mut seen = Vec::new();
    let mut bytes = [0; 1000];
    while let Ok(count @ 1..) = server.stream.read(&mut bytes).await {
        seen.extend_from_slice(&bytes[..count]);
        while let Some((length, path)) = first_request(&seen) {
            server.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{path}", path.len())).await;
            seen.drain(..length);
        }
    }
    server
}

/// Length and path of the first request, if it is whole.
fn first_request(bytes: &[u8]) -> Option<(usize, String)> {
    let text = String::from_utf8_lossy(bytes);
    let head = text.find("\r\n\r\n")? + 4;
    let path = text.split(' ').nth(1)?.to_owned();
    let body = match text[..head].split("Content-Length: ").nth(1) {
        Some(length) => length.split("\r\n").next()?.parse().ok()?,
        None if text[..head].contains("chunked") => text[head..].find("0\r\n\r\n")? + 5,
        None => 0,
    };
    (bytes.len() >= head + body).then_some((head + body, path))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The fuzz target for the relay: however the bytes are cut, the same requests go to the same sides, and the answers come
    /// back in order.
    #[test]
    fn cuts_change_nothing(
        requests in proptest::collection::vec((any::<bool>(), 0..3u8, "[a-z]{0,40}"), 1..8),
        cuts in proptest::collection::vec(1usize..90, 1..10),
    ) {
        play(async move {
            let (rules, counters) = filtered();
            let mut stage = Stage::new(rules);
            let (mut bytes, mut answers) = (Vec::new(), String::new());
            for (number, (dev, kind, body)) in requests.iter().enumerate() {
                let dev_header = if *dev { "x-dev: a\r\n" } else { "" };
                let path = format!("/{number}");
                bytes.extend_from_slice(match kind {
                    0 => format!("GET {path} HTTP/1.1\r\n{dev_header}\r\n"),
                    1 => format!(
                        "POST {path} HTTP/1.1\r\n{dev_header}Content-Length: {}\r\n\r\n{body}", body.len()
                    ),
                    _ => format!(
                        "POST {path} HTTP/1.1\r\n{dev_header}Transfer-Encoding: chunked\r\n\r\n\
                         {:x}\r\n-{body}\r\n0\r\n\r\n", body.len() + 1
                    ),
                }.as_bytes());
                answers += &format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{path}", path.len());
            }
            let mut cuts = cuts.into_iter().cycle();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (part, more) = rest.split_at(cuts.next().unwrap().min(rest.len()));
                stage.client.send(part).await;
                while let Some(server) = stage.server_now() {
                    tokio::task::spawn_local(serve(server));
                }
                tokio::task::yield_now().await;
                rest = more;
            }
            let client = stage.client.expect(answers);
            let mut client = std::pin::pin!(client);
            loop {
                tokio::select! {
                    () = &mut client => break,
                    server = Stage::next_server(&mut stage.apps, &mut stage.laptops) => {
                        tokio::task::spawn_local(serve(server));
                    }
                }
            }
            let dev = requests.iter().filter(|(dev, ..)| *dev).count() as u64;
            assert_eq!(counts(&counters), [dev, requests.len() as u64 - dev, 0, 0]);
        });
    }
}
