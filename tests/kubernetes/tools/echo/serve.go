package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"strconv"
	"strings"
)

// The ports of RFC 862, 863 and 864, whose services these resemble.
const (
	echoPort   = ":7"
	sinkPort   = ":9"
	sourcePort = ":19"
)

// maxDatagram is more than any UDP payload (65,507 bytes over IPv4), so none is ever cut.
const maxDatagram = 1 << 16

func serve([]string) error {
	failed := make(chan error)
	go func() { failed <- serveTCP(echoPort, echoStream) }()
	go func() { failed <- serveTCP(sinkPort, sink) }()
	go func() { failed <- serveTCP(sourcePort, source) }()
	go func() { failed <- serveUDP(echoPort) }()
	return <-failed
}

func serveTCP(address string, handle func(*net.TCPConn) error) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer connection.Close()
			if err := handle(connection.(*net.TCPConn)); err != nil {
				log.Printf("%s from %s: %v", address, connection.RemoteAddr(), err)
			}
		}()
	}
}

// echoStream sends everything back, and ends only after the client has half-closed.
func echoStream(connection *net.TCPConn) error {
	if _, err := io.Copy(struct{ io.Writer }{connection}, struct{ io.Reader }{connection}); err != nil {
		return err
	}
	return connection.CloseWrite()
}

// sink reads until the client half-closes, then says what it got.
func sink(connection *net.TCPConn) error {
	digest := newDigest()
	if _, err := io.CopyBuffer(digest, connection, make([]byte, 1<<18)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(connection, digest); err != nil {
		return err
	}
	return connection.CloseWrite()
}

// source reads a number, half-closes after that many bytes of the pattern, and waits for the client's digest of them.
func source(connection *net.TCPConn) error {
	reader := bufio.NewReader(connection)
	line, err := reader.ReadString('\n')
	if err != nil {
		return fmt.Errorf("the number of bytes to send: %w", err)
	}
	length, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	if err != nil {
		return err
	}
	digest := newDigest()
	if _, err := io.CopyBuffer(io.MultiWriter(connection, digest), newPattern(length), make([]byte, 1<<18)); err != nil {
		return err
	}
	if err := connection.CloseWrite(); err != nil {
		return err
	}
	got, err := reader.ReadString('\n')
	if err != nil {
		return fmt.Errorf("the client's digest: %w", err)
	}
	if strings.TrimSpace(got) != digest.String() {
		return errors.New("the client got something else: " + got)
	}
	return nil
}

func serveUDP(address string) error {
	socket, err := net.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	datagram := make([]byte, maxDatagram)
	for {
		length, from, err := socket.ReadFrom(datagram)
		if err != nil {
			return err
		}
		if _, err := socket.WriteTo(datagram[:length], from); err != nil {
			log.Printf("echo of %d bytes to %s: %v", length, from, err)
		}
	}
}
