package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"
)

// A worker has one connection and one request at a time.
type worker struct {
	plan       *loadPlan
	number     int
	record     *record
	began      time.Time
	stop       <-chan struct{}
	connection net.Conn
	reader     *bufio.Reader
	multiplex  *http.Transport
}

func (w *worker) run() {
	defer w.hangUp()
	if w.plan.http2 {
		w.multiplex = transport(true)
		defer w.multiplex.CloseIdleConnections()
	}
	interval := w.plan.interval()
	// Spread out, so that a rate is one from the first moment.
	next := w.began.Add(interval * time.Duration(w.number) / time.Duration(w.plan.connections))
	for number := range w.plan.share(w.number) {
		if !w.await(next) {
			return
		}
		next = latest(next.Add(interval), time.Now())
		marked := w.plan.mark != "" && (number+int64(w.number))%w.plan.markEvery == 0
		began := time.Now()
		server, err := w.request(number, marked)
		w.record.add(began, time.Now(), server, marked, err)
		if err != nil {
			w.hangUp()
		}
	}
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// await waits for the time, and is false if the load ends before.
func (w *worker) await(next time.Time) bool {
	select {
	case <-w.stop:
		return false
	case <-time.After(time.Until(next)):
		return true
	}
}

// request makes one request and says who answered it.
func (w *worker) request(number int64, marked bool) (string, error) {
	id := fmt.Sprintf("%d-%d", w.number, number)
	request, err := w.compose(id, marked)
	if err != nil {
		return "", err
	}
	var response *http.Response
	if w.multiplex != nil {
		response, err = w.multiplex.RoundTrip(request)
	} else {
		response, err = w.exchange(request)
	}
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	if w.plan.closing || response.Close {
		w.hangUp()
	}
	return judge(response, body, id)
}

var (
	errStatus = errors.New("status")
	errMixed  = errors.New("mixed")
)

// judge checks that the answer is a good one, and one to this request.
func judge(response *http.Response, body []byte, id string) (string, error) {
	server := response.Header.Get(servedBy)
	switch {
	case response.StatusCode != http.StatusOK:
		return "", fmt.Errorf("%w %d", errStatus, response.StatusCode)
	case server == "":
		return "unnamed", nil
	case !strings.Contains(string(body), `"`+id+`"`):
		return "", fmt.Errorf("%w: request %s was answered with %.200s", errMixed, id, body)
	}
	return server, nil
}

func (w *worker) compose(id string, marked bool) (*http.Request, error) {
	request, err := http.NewRequest(w.plan.method, w.plan.target.String(), strings.NewReader(w.plan.body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("X-Request", id)
	request.Close = w.plan.closing
	fields := w.plan.fields
	if marked {
		fields = append(fields[:len(fields):len(fields)], w.plan.mark)
	}
	for _, field := range fields {
		name, value, _ := strings.Cut(field, "=")
		if strings.EqualFold(name, "host") {
			request.Host = value
		}
		request.Header.Set(name, value)
	}
	return request, nil
}

// exchange is HTTP/1.1 without the retries of Go's own client, which would hide what is to be counted.
func (w *worker) exchange(request *http.Request) (*http.Response, error) {
	if w.connection == nil {
		connection, err := net.DialTimeout("tcp", w.plan.target.Host, patience)
		if err != nil {
			return nil, err
		}
		w.connection, w.reader = connection, bufio.NewReader(connection)
	}
	if err := w.connection.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, err
	}
	if err := request.Write(w.connection); err != nil {
		return nil, err
	}
	return http.ReadResponse(w.reader, request)
}

func (w *worker) hangUp() {
	if w.connection != nil {
		w.connection.Close()
		w.connection = nil
	}
}

// transport speaks one version of HTTP only, in the clear.
func transport(http2 bool) *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	return &http.Transport{Protocols: protocols, DisableCompression: true, ResponseHeaderTimeout: patience}
}

// kind says in a word how a request failed.
func kind(err error) string {
	var timeout net.Error
	switch {
	case errors.Is(err, errStatus):
		return err.Error()
	case errors.Is(err, errMixed):
		return "mixed"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "closed"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return "other"
}
