package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
)

// greet speaks first, as servers of SSH do (RFC 4253, 4.2): it says a version and who it is, and then sends back what it hears.
func greet(args []string) error {
	flags := flag.NewFlagSet("greet", flag.ContinueOnError)
	name := flags.String("name", ownName(), "who greets")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("an address is needed")
	}
	return serveTCP(flags.Arg(0), func(connection *net.TCPConn) error {
		if _, err := fmt.Fprintf(connection, "SSH-2.0-tpd %s\r\n", *name); err != nil {
			return err
		}
		return echoStream(connection)
	})
}
