package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// patience is how long one reply may take: far more than any path here needs.
const patience = 10 * time.Second

// parse reads HOST:PORT and a number from a client's arguments.
func parse(args []string) (string, int64, error) {
	if len(args) < 2 {
		return "", 0, errors.New("an address and a number are needed")
	}
	number, err := strconv.ParseInt(args[1], 10, 64)
	return args[0], number, err
}

func dial(address string) (*net.TCPConn, error) {
	connection, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return nil, err
	}
	return connection.(*net.TCPConn), nil
}

// echo sends bytes, half-closes, and expects each of them back before the other end closes.
func echo(args []string) error {
	address, length, err := parse(args)
	if err != nil {
		return err
	}
	connection, err := dial(address)
	if err != nil {
		return err
	}
	defer connection.Close()
	began := time.Now()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(connection, newPattern(length))
		sent <- errors.Join(err, connection.CloseWrite())
	}()
	digest := newDigest()
	if _, err := io.Copy(digest, connection); err != nil {
		return err
	}
	if err := <-sent; err != nil {
		return err
	}
	return compare(digest, length, began)
}

// send fills the sink, and compares the digest that it answers with.
func send(args []string) error {
	address, length, err := parse(args)
	if err != nil {
		return err
	}
	connection, err := dial(address)
	if err != nil {
		return err
	}
	defer connection.Close()
	began := time.Now()
	digest := newDigest()
	if _, err := io.CopyBuffer(io.MultiWriter(connection, digest), newPattern(length), make([]byte, 1<<18)); err != nil {
		return err
	}
	if err := connection.CloseWrite(); err != nil {
		return err
	}
	answer, err := io.ReadAll(connection)
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(answer)); got != digest.String() {
		return fmt.Errorf("sent %s, but there arrived %q", digest, got)
	}
	report(digest, began)
	return nil
}

// receive asks the source for bytes, and answers with their digest after the source has half-closed.
func receive(args []string) error {
	address, length, err := parse(args)
	if err != nil {
		return err
	}
	connection, err := dial(address)
	if err != nil {
		return err
	}
	defer connection.Close()
	began := time.Now()
	if _, err := fmt.Fprintln(connection, length); err != nil {
		return err
	}
	digest := newDigest()
	if _, err := io.CopyBuffer(digest, connection, make([]byte, 1<<18)); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(connection, digest); err != nil {
		return err
	}
	return compare(digest, length, began)
}

func compare(got *digest, length int64, began time.Time) error {
	if want := patternDigest(length); got.String() != want {
		return fmt.Errorf("got %s instead of %s", got, want)
	}
	report(got, began)
	return nil
}

func report(digest *digest, began time.Time) {
	seconds := time.Since(began).Seconds()
	fmt.Printf("ok: %s, %.2f s, %.2f Gb/s\n", digest, seconds, float64(digest.count)*8/seconds/1e9)
}

// pingPong measures round trips of SIZE bytes (64 unless told) on one connection.
func pingPong(args []string) error {
	address, rounds, err := parse(args)
	if err != nil {
		return err
	}
	size := 64
	if len(args) > 2 {
		if size, err = strconv.Atoi(args[2]); err != nil {
			return err
		}
	}
	connection, err := dial(address)
	if err != nil {
		return err
	}
	defer connection.Close()
	message, reply := make([]byte, size), make([]byte, size)
	times := make([]time.Duration, 0, rounds)
	for range rounds {
		began := time.Now()
		if err := roundTrip(connection, message, reply); err != nil {
			return err
		}
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	fmt.Printf("ok: %d rounds, p50 %d us, p99 %d us\n", rounds, times[len(times)/2].Microseconds(), times[len(times)*99/100].Microseconds())
	return nil
}

func roundTrip(connection net.Conn, message, reply []byte) error {
	if err := connection.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := connection.Write(message); err != nil {
		return err
	}
	if _, err := io.ReadFull(connection, reply); err != nil {
		return err
	}
	if !bytes.Equal(message, reply) {
		return errors.New("the echo differs from what was sent")
	}
	return nil
}

// many holds CONNECTIONS open at once, and has each echo a message of its own while all the others are there.
func many(args []string) error {
	address, count, err := parse(args)
	if err != nil {
		return err
	}
	began := time.Now()
	connections := make([]net.Conn, count)
	err = inParallel(count, func(i int64) (err error) {
		connections[i], err = dial(address)
		return err
	})
	defer func() {
		for _, connection := range connections {
			if connection != nil {
				connection.Close()
			}
		}
	}()
	if err != nil {
		return err
	}
	opened := time.Since(began)
	err = inParallel(count, func(i int64) error {
		message := []byte(fmt.Sprintf("connection %d of %d", i, count))
		return roundTrip(connections[i], message, make([]byte, len(message)))
	})
	if err != nil {
		return err
	}
	fmt.Printf("ok: %d connections at once, opened in %d ms\n", count, opened.Milliseconds())
	return nil
}

func inParallel(count int64, work func(int64) error) error {
	results := make([]error, count)
	var group sync.WaitGroup
	for i := range count {
		group.Go(func() { results[i] = work(i) })
	}
	group.Wait()
	failed, first := 0, error(nil)
	for _, err := range results {
		if err != nil {
			failed++
			first = err
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d failed, one with: %w", failed, count, first)
	}
	return nil
}

// rate opens connections one after another, each for one round trip, and counts them.
func rate(args []string) error {
	address, seconds, err := parse(args)
	if err != nil {
		return err
	}
	message := []byte("tpd")
	count, began := 0, time.Now()
	for time.Since(began) < time.Duration(seconds)*time.Second {
		connection, err := dial(address)
		if err != nil {
			return err
		}
		err = roundTrip(connection, message, make([]byte, len(message)))
		connection.Close()
		if err != nil {
			return err
		}
		count++
	}
	fmt.Printf("ok: %.0f connections/s\n", float64(count)/time.Since(began).Seconds())
	return nil
}

// udp sends COUNT datagrams of SIZE bytes (one unless told) and expects each back whole.
func udp(args []string) error {
	address, size, err := parse(args)
	if err != nil {
		return err
	}
	count := 1
	if len(args) > 2 {
		if count, err = strconv.Atoi(args[2]); err != nil {
			return err
		}
	}
	socket, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	defer socket.Close()
	message, err := io.ReadAll(newPattern(size))
	if err != nil {
		return err
	}
	reply := make([]byte, maxDatagram)
	for i := range count {
		if err := socket.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		if _, err := socket.Write(message); err != nil {
			return err
		}
		length, err := socket.Read(reply)
		if err != nil {
			return fmt.Errorf("datagram %d: %w", i+1, err)
		}
		if !bytes.Equal(reply[:length], message) {
			return fmt.Errorf("datagram %d came back as %d other bytes", i+1, length)
		}
	}
	fmt.Printf("ok: %d datagrams of %d bytes\n", count, size)
	return nil
}

// askDatagram sends one to an application, and prints who answered.
func askDatagram(args []string) error {
	if len(args) == 0 {
		return errors.New("an address is needed")
	}
	socket, err := net.Dial("udp", args[0])
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := socket.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := socket.Write([]byte("who are you?")); err != nil {
		return err
	}
	reply := make([]byte, maxDatagram)
	length, err := socket.Read(reply)
	if err != nil {
		return err
	}
	name, echo, _ := strings.Cut(string(reply[:length]), " ")
	if echo != "who are you?" {
		return fmt.Errorf("the answer is %q", reply[:length])
	}
	fmt.Println(name)
	return nil
}

// connect prints how a connection attempt ends, in one word, and after how many milliseconds. It fails only on a bad argument.
func connect(args []string) error {
	if len(args) == 0 {
		return errors.New("an address is needed")
	}
	timeout := patience
	if len(args) > 1 {
		seconds, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		timeout = time.Duration(seconds) * time.Second
	}
	began := time.Now()
	connection, err := net.DialTimeout("tcp", args[0], timeout)
	outcome := dialOutcome(err)
	took := time.Since(began)
	if err == nil {
		outcome = stayedOpen(connection)
		connection.Close()
	}
	fmt.Printf("%s %d ms\n", outcome, took.Milliseconds())
	return nil
}

func dialOutcome(err error) string {
	switch {
	case err == nil:
		return "connected"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "unreachable"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return "timeout"
	}
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return "timeout"
	}
	return "error: " + err.Error()
}

// stayedOpen tells a real connection from one that is accepted on somebody's behalf and dropped a moment later.
func stayedOpen(connection net.Conn) string {
	if err := connection.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		return "error: " + err.Error()
	}
	_, err := bufio.NewReader(connection).ReadByte()
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		return "connected"
	}
	return "connected-then-closed"
}
