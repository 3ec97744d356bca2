package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// servedBy is the field of every answer, or the trailer of a gRPC one, that names who answered.
const servedBy = "X-Served-By"

// maxEchoed is how much of a body is sent back; of a longer one there are only length and digest.
const maxEchoed = 4 << 10

// An application that says who it is and what it got.
type application struct {
	name     string
	counts   counts
	stopping atomic.Bool
}

// What an application has answered since it began.
type counts struct {
	Requests    atomic.Int64
	Connections atomic.Int64
	Datagrams   atomic.Int64
}

// An answer: what was asked, as it arrived.
type answer struct {
	Server   string      `json:"server"`
	Method   string      `json:"method"`
	Target   string      `json:"target"`
	Protocol string      `json:"protocol"`
	Host     string      `json:"host"`
	Remote   string      `json:"remote"`
	Headers  http.Header `json:"headers"`
	Trailers http.Header `json:"trailers,omitempty"`
	Length   int64       `json:"length"`
	Digest   string      `json:"digest"`
	Body     string      `json:"body,omitempty"`
}

// serveHTTP is an application on one address: HTTP/1.1, HTTP/2 by prior knowledge or by upgrade, gRPC, WebSocket, all of it over
// TLS if that is asked for, and datagrams. Told to end, it goes on for a while as good applications do, asking each client to come
// back on another connection.
func serveHTTP(args []string) error {
	flags := flag.NewFlagSet("http", flag.ContinueOnError)
	name := flags.String("name", ownName(), "who answers")
	linger := flags.Duration("linger", 0, "how long it serves on after SIGTERM")
	secure := flags.Bool("tls", false, "over TLS, with a certificate that nobody vouches for")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() == 0 {
		return errors.New("an address is needed")
	}
	app := &application{name: *name}
	var encryption *tls.Config
	if *secure {
		var err error
		if encryption, err = selfSigned(); err != nil {
			return err
		}
	}
	failed := make(chan error, 2*flags.NArg())
	var servers []*http.Server
	for _, address := range flags.Args() {
		server := app.server(encryption)
		servers = append(servers, server)
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		datagrams, err := net.ListenPacket("udp", address)
		if err != nil {
			return err
		}
		go func() {
			if server.TLSConfig != nil {
				failed <- server.ServeTLS(listener, "", "")
			} else {
				failed <- server.Serve(listener)
			}
		}()
		go func() { failed <- app.serveDatagrams(datagrams) }()
	}
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGTERM, syscall.SIGINT)
	select {
	case err := <-failed:
		return err
	case <-told:
		return app.end(servers, *linger)
	}
}

// ownName is the pod's, where there is one.
func ownName() string {
	if name := os.Getenv("POD_NAME"); name != "" {
		return name
	}
	name, _ := os.Hostname()
	return name
}

// server is one on TLS if there is a configuration for that.
func (app *application) server(encryption *tls.Config) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(encryption != nil)
	protocols.SetUnencryptedHTTP2(encryption == nil)
	return &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if offersHTTP2(r) && r.URL.Path != stay {
				app.goOver(w, r)
			} else {
				app.ServeHTTP(w, r)
			}
		}),
		Protocols: protocols,
		TLSConfig: encryption,
		ConnState: func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				app.counts.Connections.Add(1)
			}
		},
	}
}

func (app *application) end(servers []*http.Server, linger time.Duration) error {
	app.stopping.Store(true)
	time.Sleep(linger)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var group sync.WaitGroup
	for _, server := range servers {
		group.Go(func() { _ = server.Shutdown(ctx) })
	}
	group.Wait()
	return nil
}

func (app *application) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if app.stopping.Load() && r.ProtoMajor == 1 {
		w.Header().Set("Connection", "close")
	}
	w.Header().Set(servedBy, app.name)
	switch {
	case r.URL.Path == "/healthz":
		fmt.Fprintln(w, "ok")
	case r.URL.Path == healthCheck:
		answerHealthCheck(w)
	case strings.HasPrefix(r.Header.Get("Content-Type"), grpcType):
		app.counts.Requests.Add(1)
		app.echoMessages(w, r)
	case r.ProtoMajor == 1 && strings.EqualFold(r.Header.Get("Upgrade"), "websocket"):
		app.counts.Requests.Add(1)
		app.upgrade(w, r)
	case r.URL.Path == "/counts":
		app.tell(w)
	default:
		app.counts.Requests.Add(1)
		app.answer(w, r)
	}
}

// tell says what has been answered so far, without counting itself.
func (app *application) tell(w http.ResponseWriter) {
	writeJSON(w, map[string]int64{
		"requests":    app.counts.Requests.Load(),
		"connections": app.counts.Connections.Load(),
		"datagrams":   app.counts.Datagrams.Load(),
	})
}

// answer describes the request. The query can ask for more: delay=500ms before it is answered at all, size=N bytes of the
// pattern instead of a description, chunks=N of them every=100ms, status=N, reset instead of an answer, and lookup=NAME.
func (app *application) answer(w http.ResponseWriter, r *http.Request) {
	wish, err := parseWish(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	time.Sleep(wish.delay)
	switch {
	case wish.reset:
		reset(w)
	case wish.lookup != "":
		lookUp(r.Context(), w, wish.lookup)
	case wish.chunks > 0:
		sendChunks(w, wish)
	case wish.size >= 0:
		_, _ = io.Copy(w, newPattern(wish.size))
	default:
		app.describe(w, r, wish.status)
	}
}

func (app *application) describe(w http.ResponseWriter, r *http.Request, status int) {
	digest, start := newDigest(), new(prefix)
	if _, err := io.Copy(io.MultiWriter(digest, start), r.Body); err != nil {
		log.Printf("body of %s %s from %s: %v", r.Method, r.URL, r.RemoteAddr, err)
		reset(w)
		return
	}
	said := answer{
		Server: app.name, Method: r.Method, Target: r.RequestURI, Protocol: r.Proto, Host: r.Host, Remote: r.RemoteAddr,
		Headers: r.Header, Trailers: r.Trailer, Length: digest.count, Digest: digest.String(),
	}
	if digest.count <= maxEchoed {
		said.Body = start.String()
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	writeJSON(w, said)
}

// prefix keeps the first maxEchoed bytes of what is written to it.
type prefix struct{ strings.Builder }

func (p *prefix) Write(bytes []byte) (int, error) {
	if room := maxEchoed - p.Len(); room > 0 {
		p.Builder.Write(bytes[:min(room, len(bytes))])
	}
	return len(bytes), nil
}

func writeJSON(w io.Writer, value any) {
	// A client that has gone is no news to a server.
	_ = json.NewEncoder(w).Encode(value)
}

func lookUp(ctx context.Context, w http.ResponseWriter, name string) {
	answers, err := lookup(ctx, &net.Resolver{PreferGo: true}, name, "ip")
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	fmt.Fprintln(w, strings.Join(answers, "\n"))
}

// reset ends the connection in the middle of things.
func reset(w http.ResponseWriter) {
	connection, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // HTTP/2: a reset of the stream
	}
	if tcp, ok := connection.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	connection.Close()
}

func sendChunks(w http.ResponseWriter, wish wish) {
	controller := http.NewResponseController(w)
	for number := range wish.chunks {
		if number > 0 {
			time.Sleep(wish.every)
		}
		if _, err := fmt.Fprintf(w, "chunk %d of %d\n", number+1, wish.chunks); err != nil {
			return
		}
		if err := controller.Flush(); err != nil {
			return
		}
	}
}

// serveDatagrams sends each one back behind the name of who did.
func (app *application) serveDatagrams(socket net.PacketConn) error {
	datagram := make([]byte, maxDatagram)
	for {
		length, from, err := socket.ReadFrom(datagram)
		if err != nil {
			return err
		}
		app.counts.Datagrams.Add(1)
		reply := append([]byte(app.name+" "), datagram[:length]...)
		if _, err := socket.WriteTo(reply, from); err != nil {
			log.Printf("answer of %d bytes to %s: %v", len(reply), from, err)
		}
	}
}
