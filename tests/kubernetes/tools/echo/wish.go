package main

import (
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// What a request's query asks of the answer.
type wish struct {
	delay  time.Duration
	size   int64
	chunks int
	every  time.Duration
	status int
	reset  bool
	lookup string
}

func parseWish(query url.Values) (wish, error) {
	wish := wish{size: -1, every: 100 * time.Millisecond, status: http.StatusOK, lookup: query.Get("lookup")}
	wish.reset = query.Has("reset")
	var err error
	set := func(name string, parse func(string) error) {
		if value := query.Get(name); value != "" && err == nil {
			err = parse(value)
		}
	}
	set("delay", func(text string) (err error) { wish.delay, err = time.ParseDuration(text); return })
	set("every", func(text string) (err error) { wish.every, err = time.ParseDuration(text); return })
	set("size", func(text string) (err error) { wish.size, err = strconv.ParseInt(text, 10, 64); return })
	set("chunks", func(text string) (err error) { wish.chunks, err = strconv.Atoi(text); return })
	set("status", func(text string) (err error) { wish.status, err = strconv.Atoi(text); return })
	return wish, err
}
