package main

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"
)

// What a load is made of.
type loadPlan struct {
	target      *url.URL
	connections int
	seconds     int
	while       string
	requests    int64
	rate        float64
	method      string
	body        string
	fields      fields
	mark        string
	markEvery   int64
	closing     bool
	http2       bool
}

// fields are NAME=VALUE flags that can be given more than once.
type fields []string

func (f *fields) String() string { return strings.Join(*f, " ") }

func (f *fields) Set(text string) error {
	if !strings.Contains(text, "=") {
		return fmt.Errorf("%q is not NAME=VALUE", text)
	}
	*f = append(*f, text)
	return nil
}

// load keeps connections busy and counts, and never tries anything twice: one request that fails is one failure. It prints
// its record as JSON.
func load(args []string) error {
	plan, err := parseLoad(args)
	if err != nil {
		return err
	}
	records := make([]*record, plan.connections)
	began := time.Now()
	stop, release := plan.stopper()
	defer release()
	var group sync.WaitGroup
	for number := range plan.connections {
		records[number] = newRecord()
		worker := worker{plan: plan, number: number, record: records[number], began: began, stop: stop}
		group.Go(worker.run)
	}
	group.Wait()
	writeJSON(os.Stdout, merge(records).summary())
	return nil
}

func parseLoad(args []string) (*loadPlan, error) {
	plan := new(loadPlan)
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	flags.IntVar(&plan.connections, "connections", 8, "how many, each with one request at a time")
	flags.IntVar(&plan.seconds, "seconds", 10, "how long at most")
	flags.StringVar(&plan.while, "while", "", "end when this file is gone")
	flags.Int64Var(&plan.requests, "requests", 0, "how many requests at most, all connections together")
	flags.Float64Var(&plan.rate, "rate", 0, "requests a second, all connections together; 0 is as many as there can be")
	flags.StringVar(&plan.method, "method", "GET", "method")
	flags.StringVar(&plan.body, "body", "", "what is sent with each")
	flags.Var(&plan.fields, "header", "NAME=VALUE of every request")
	flags.StringVar(&plan.mark, "mark", "", "NAME=VALUE of every so many requests only")
	flags.Int64Var(&plan.markEvery, "mark-every", 10, "how many requests there are to a marked one")
	flags.BoolVar(&plan.closing, "close", false, "use each connection once")
	flags.BoolVar(&plan.http2, "http2", false, "speak HTTP/2 by prior knowledge")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if flags.NArg() != 1 || plan.connections < 1 || plan.markEvery < 1 {
		return nil, errors.New("one URL is needed, and counts above zero")
	}
	var err error
	if plan.target, err = url.Parse(flags.Arg(0)); err != nil {
		return nil, err
	}
	if plan.target.Port() == "" {
		plan.target.Host = net.JoinHostPort(plan.target.Hostname(), "80")
	}
	return plan, nil
}

// stopper tells when to end: after the time, or once the file is gone.
func (plan *loadPlan) stopper() (stop chan struct{}, release func()) {
	stop = make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(stop)
		deadline := time.After(time.Duration(plan.seconds) * time.Second)
		look := time.NewTicker(20 * time.Millisecond)
		defer look.Stop()
		for {
			select {
			case <-deadline:
				return
			case <-done:
				return
			case <-look.C:
				if plan.while != "" && gone(plan.while) {
					return
				}
			}
		}
	}()
	return stop, sync.OnceFunc(func() { close(done) })
}

func gone(file string) bool {
	_, err := os.Stat(file)
	return errors.Is(err, os.ErrNotExist)
}

// share is how many of the requests this worker makes; there is no limit if the plan has none.
func (plan *loadPlan) share(number int) int64 {
	if plan.requests == 0 {
		return 1 << 62
	}
	all := int64(plan.connections)
	return (plan.requests + all - 1 - int64(number)) / all
}

// interval is the time from one of a worker's requests to its next.
func (plan *loadPlan) interval() time.Duration {
	if plan.rate == 0 {
		return 0
	}
	return time.Duration(float64(plan.connections) / plan.rate * float64(time.Second))
}
