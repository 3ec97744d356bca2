package main

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
)

// A failed connection attempt is tried again with another server, for it cannot have been a request yet; nothing else is.
// A worker that is replaced closes a client's idle connection only with the answer to one more request: closed at once, it could
// meet a request on its way.
const header = `global
    stats socket %[1]s/admin.sock mode 600 level admin expose-fd listeners
    maxconn 4096
    nbthread 2
    hard-stop-after 10s

defaults
    mode http
    balance roundrobin
    option http-keep-alive
    option idle-close-on-response
    http-reuse safe
    option redispatch 1
    retries 3
    retry-on conn-failure
    timeout connect 1s
    timeout client 60s
    timeout server 60s
    timeout tunnel 1h

frontend http
    bind :::%[2]d v4v6
    http-request set-var(txn.host) req.hdr(host),field(1,:),lower
`

// configuration is a whole one: routes in their order, and for each backend a server per slot.
func configuration(directory string, port int, routes []route, state slots) []byte {
	var text bytes.Buffer
	fmt.Fprintf(&text, header, directory, port)
	for _, route := range routes {
		fmt.Fprintf(&text, "    use_backend %s if", route.backend)
		if route.host != "" {
			fmt.Fprintf(&text, " { var(txn.host) -m str %s }", route.host)
		}
		if route.exact {
			fmt.Fprintf(&text, " { path %s }\n", route.path)
		} else {
			fmt.Fprintf(&text, " { path_beg %s }\n", route.path)
		}
	}
	fmt.Fprint(&text, "    default_backend none\n\nbackend none\n    http-request return status 404\n")
	for _, name := range slices.Sorted(maps.Keys(state)) {
		fmt.Fprintf(&text, "\nbackend %s\n", name)
		for number, address := range state[name] {
			if address == "" {
				fmt.Fprintf(&text, "    server s%d 127.0.0.1:1 disabled\n", number)
			} else {
				fmt.Fprintf(&text, "    server s%d %s\n", number, address)
			}
		}
	}
	return text.Bytes()
}
