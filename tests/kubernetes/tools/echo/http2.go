package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"net/http"

	"golang.org/x/net/http2"
)

// stay is the path of an application that has never heard of HTTP/2: it takes no offer to go over to it.
const stay = "/http1"

// maxUpgraded is the longest body of a request that is answered in HTTP/2, which has to be read before: the answer begins with
// the new protocol.
const maxUpgraded = 1 << 20

// offersHTTP2 tells whether a request may be answered in HTTP/2 (RFC 7540, 3.2; RFC 9113 has no such upgrade any more).
func offersHTTP2(r *http.Request) bool {
	return r.ProtoMajor == 1 && r.Header.Get("Upgrade") == "h2c"
}

// goOver answers a request that offers HTTP/2, and those that follow it, in HTTP/2.
func (app *application) goOver(w http.ResponseWriter, r *http.Request) {
	settings, badSettings := base64.RawURLEncoding.DecodeString(r.Header.Get("HTTP2-Settings"))
	body, badBody := io.ReadAll(http.MaxBytesReader(w, r.Body, maxUpgraded))
	if err := errors.Join(badSettings, badBody); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	connection, read, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer connection.Close()
	const switching = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
	if _, err := io.WriteString(connection, switching); err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	options := &http2.ServeConnOpts{Handler: app, UpgradeRequest: r, Settings: settings}
	new(http2.Server).ServeConn(buffered{connection, read.Reader}, options)
}
