package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
)

// As much of gRPC over HTTP/2 as tells that it passes: messages framed by their length, streams both ways, trailers.
const (
	grpcType    = "application/grpc"
	healthCheck = "/grpc.health.v1.Health/Check"
	// maxMessage is gRPC's own default limit.
	maxMessage = 4 << 20
)

// answerHealthCheck says SERVING, which is field 1 with the value 1.
func answerHealthCheck(w http.ResponseWriter) {
	w.Header().Set("Content-Type", grpcType)
	w.Header().Set("Trailer", "Grpc-Status")
	_ = writeMessage(w, []byte{0x08, 0x01})
	w.Header().Set("Grpc-Status", "0")
}

// echoMessages returns every message as soon as it has arrived, and says who did in a trailer.
func (app *application) echoMessages(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", grpcType)
	w.Header().Set("Trailer", "Grpc-Status, Grpc-Message, "+servedBy+"-Trailer")
	controller := http.NewResponseController(w)
	status, why := "0", ""
	if err := controller.Flush(); err != nil {
		return
	}
	for {
		message, err := readMessage(r.Body)
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = writeMessage(w, message)
		}
		if err == nil {
			err = controller.Flush()
		}
		if err != nil {
			status, why = "13", err.Error()
			break
		}
	}
	w.Header().Set("Grpc-Status", status)
	w.Header().Set("Grpc-Message", why)
	w.Header().Set(servedBy+"-Trailer", app.name)
}

func writeMessage(w io.Writer, message []byte) error {
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message)))
	_, err := w.Write(append(frame, message...))
	return err
}

func readMessage(r io.Reader) ([]byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	length := binary.BigEndian.Uint32(head[1:])
	if length > maxMessage {
		return nil, fmt.Errorf("a message of %d bytes", length)
	}
	message := make([]byte, length)
	_, err := io.ReadFull(r, message)
	return message, err
}

// callGRPC sends COUNT messages on one stream, each after the one before has come back, and prints who answered.
func callGRPC(args []string) error {
	url, count, err := parse(args)
	if err != nil {
		return err
	}
	size := 64
	if len(args) > 2 {
		if size, err = strconv.Atoi(args[2]); err != nil {
			return err
		}
	}
	reader, writer := io.Pipe()
	request, err := http.NewRequest(http.MethodPost, url, reader)
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", grpcType)
	request.Header.Set("Te", "trailers")
	response, err := transport(true).RoundTrip(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	for number := range count {
		if err := exchange(response.Body, writer, number, size); err != nil {
			return fmt.Errorf("message %d: %w", number+1, err)
		}
	}
	if err := writer.Close(); err != nil {
		return err
	}
	if rest, err := io.ReadAll(response.Body); err != nil || len(rest) > 0 {
		return fmt.Errorf("%d bytes after the last message: %w", len(rest), err)
	}
	if status := response.Trailer.Get("Grpc-Status"); status != "0" {
		return fmt.Errorf("status %q, trailers %v", status, response.Trailer)
	}
	if who := response.Trailer.Get(servedBy + "-Trailer"); who != response.Header.Get(servedBy) {
		return fmt.Errorf("the headers are of %s and the trailers of %s", response.Header.Get(servedBy), who)
	}
	fmt.Printf("%s %d messages\n", response.Header.Get(servedBy), count)
	return nil
}

func exchange(from io.Reader, to io.Writer, number int64, size int) error {
	message := bytes.Repeat([]byte{byte(number)}, size)
	if err := writeMessage(to, message); err != nil {
		return err
	}
	echo, err := readMessage(from)
	if err == nil && !bytes.Equal(echo, message) {
		err = errors.New("the echo differs from what was sent")
	}
	return err
}
