// Command tpd-echo is both ends of the end-to-end tests: a server in a pod, and clients on the laptop that check every
// byte. It is static and uses Go's own resolver, so it also stands for the programs that do without the C library.
package main

import (
	"fmt"
	"os"
	"sort"
	"strings"
)

// A command of the client or server: its arguments, in words, and what it does.
type command struct {
	usage string
	run   func(args []string) error
}

var commands = map[string]command{
	"serve":     {"", serve},
	"http":      {"[-name NAME] [-linger TIME] [-tls] ADDRESS...", serveHTTP},
	"greet":     {"[-name NAME] ADDRESS", greet},
	"echo":      {"HOST:7 BYTES", echo},
	"send":      {"HOST:9 BYTES", send},
	"receive":   {"HOST:19 BYTES", receive},
	"ping-pong": {"HOST:7 ROUNDS [SIZE]", pingPong},
	"many":      {"HOST:7 CONNECTIONS", many},
	"rate":      {"HOST:7 SECONDS", rate},
	"udp":       {"HOST:7 SIZE [COUNT]", udp},
	"connect":   {"HOST:PORT [TIMEOUT_SECONDS]", connect},
	"load":      {"[-help] URL", load},
	"grpc":      {"http://HOST:PORT/SERVICE/METHOD MESSAGES [SIZE]", callGRPC},
	"websocket": {"http://HOST:PORT/PATH ROUNDS [NAME=VALUE...]", webSocket},
	"udp-who":   {"HOST:PORT", askDatagram},
	"resolve":   {"NAME [ip|a|aaaa|cname|srv|txt|mx|ptr]", resolve},
}

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	command, known := commands[os.Args[1]]
	if !known {
		usage()
	}
	if err := command.run(os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "tpd-echo:", err)
		os.Exit(1)
	}
}

func usage() {
	var lines []string
	for name, command := range commands {
		lines = append(lines, fmt.Sprintf("  tpd-echo %s %s", name, command.usage))
	}
	sort.Strings(lines)
	fmt.Fprintf(os.Stderr, "usage:\n%s\n", strings.Join(lines, "\n"))
	os.Exit(64)
}
