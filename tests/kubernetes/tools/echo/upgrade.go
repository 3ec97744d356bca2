package main

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// websocketID is what RFC 6455, 1.3 has servers append to a client's key.
const websocketID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

// upgrade leaves HTTP: a WebSocket's handshake is answered as one, and from then on every byte is sent back as it came.
func (app *application) upgrade(w http.ResponseWriter, r *http.Request) {
	connection, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer connection.Close()
	lines := []string{
		"HTTP/1.1 101 Switching Protocols", "Connection: Upgrade",
		"Upgrade: " + r.Header.Get("Upgrade"), servedBy + ": " + app.name,
	}
	if key := r.Header.Get("Sec-WebSocket-Key"); key != "" {
		lines = append(lines, "Sec-WebSocket-Accept: "+acceptKey(key))
	}
	if _, err := io.WriteString(connection, strings.Join(lines, "\r\n")+"\r\n\r\n"); err != nil {
		return
	}
	_, _ = io.Copy(struct{ io.Writer }{connection}, buffered)
}

func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + websocketID))
	return base64.StdEncoding.EncodeToString(sum[:])
}

// webSocket shakes hands and makes COUNT round trips of a masked frame; it prints who answered.
func webSocket(args []string) error {
	address, rounds, err := parse(args)
	if err != nil {
		return err
	}
	where, err := url.Parse(address)
	if err != nil {
		return err
	}
	connection, err := dial(where.Host)
	if err != nil {
		return err
	}
	defer connection.Close()
	const key = "dGhlIHNhbXBsZSBub25jZQ=="
	_, err = fmt.Fprintf(connection, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n%s\r\n", where.RequestURI(), where.Host, key, fieldLines(args[2:]))
	if err != nil {
		return err
	}
	reader := bufio.NewReader(connection)
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		return err
	}
	if response.StatusCode != http.StatusSwitchingProtocols || response.Header.Get("Sec-WebSocket-Accept") != acceptKey(key) {
		return errors.New("no handshake: " + response.Status)
	}
	both := buffered{connection, reader}
	for number := range rounds {
		frame := append([]byte{0x82, 0x80 | 16, 1, 2, 3, 4}, fmt.Sprintf("round %10s", strconv.FormatInt(number, 10))...)
		if err := roundTrip(both, frame, make([]byte, len(frame))); err != nil {
			return fmt.Errorf("round %d: %w", number+1, err)
		}
	}
	fmt.Printf("%s %d rounds\n", response.Header.Get(servedBy), rounds)
	return nil
}

// buffered reads what a bufio.Reader has taken from the connection already.
type buffered struct {
	net.Conn
	reader *bufio.Reader
}

func (b buffered) Read(p []byte) (int, error) { return b.reader.Read(p) }

// fieldLines are NAME=VALUE arguments as lines of a request.
func fieldLines(fields []string) string {
	var lines strings.Builder
	for _, field := range fields {
		name, value, _ := strings.Cut(field, "=")
		fmt.Fprintf(&lines, "%s: %s\r\n", name, value)
	}
	return lines.String()
}
