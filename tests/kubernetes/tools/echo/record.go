package main

import (
	"maps"
	"slices"
	"time"
)

const (
	// bucket is how finely a record tells when something was answered: well below every bound that is tested.
	bucket = 50 * time.Millisecond
	// maxFailures is how many a record tells one by one; it counts all.
	maxFailures = 200
)

// What became of the requests of one worker, or of all.
type record struct {
	requests int64
	failed   int64
	failures []failure
	unmarked map[string]int64
	marked   map[string]int64
	times    []time.Duration
	buckets  map[int64]*moment
}

// A failure: when it began and ended, milliseconds of Unix time.
type failure struct {
	Began int64  `json:"began"`
	Ended int64  `json:"ended"`
	Kind  string `json:"kind"`
	Error string `json:"error"`
}

// A moment, by its beginning in milliseconds of Unix time: who answered requests in it, and how many failed.
type moment struct {
	At     int64            `json:"at"`
	Served map[string]int64 `json:"served"`
	Failed int64            `json:"failed"`
}

// A summary is what load prints.
type summary struct {
	Requests  int64            `json:"requests"`
	Failed    int64            `json:"failed"`
	Failures  []failure        `json:"failures"`
	Unmarked  map[string]int64 `json:"unmarked"`
	Marked    map[string]int64 `json:"marked"`
	P50Micros int64            `json:"p50Micros"`
	MaxMicros int64            `json:"maxMicros"`
	Timeline  []*moment        `json:"timeline"`
}

func newRecord() *record {
	return &record{unmarked: map[string]int64{}, marked: map[string]int64{}, buckets: map[int64]*moment{}}
}

func (r *record) add(began, ended time.Time, server string, marked bool, err error) {
	r.requests++
	r.times = append(r.times, ended.Sub(began))
	moment := r.moment(ended.Truncate(bucket).UnixMilli())
	if err != nil {
		r.failed++
		moment.Failed++
		if len(r.failures) < maxFailures {
			r.failures = append(r.failures, failure{began.UnixMilli(), ended.UnixMilli(), kind(err), err.Error()})
		}
		return
	}
	moment.Served[server]++
	if marked {
		r.marked[server]++
	} else {
		r.unmarked[server]++
	}
}

func (r *record) moment(at int64) *moment {
	if r.buckets[at] == nil {
		r.buckets[at] = &moment{At: at, Served: map[string]int64{}}
	}
	return r.buckets[at]
}

func merge(records []*record) *record {
	all := newRecord()
	for _, one := range records {
		all.requests += one.requests
		all.failed += one.failed
		all.failures = append(all.failures, one.failures...)
		all.times = append(all.times, one.times...)
		sum(all.unmarked, one.unmarked)
		sum(all.marked, one.marked)
		for at, moment := range one.buckets {
			into := all.moment(at)
			into.Failed += moment.Failed
			sum(into.Served, moment.Served)
		}
	}
	return all
}

func sum(into, from map[string]int64) {
	for name, count := range from {
		into[name] += count
	}
}

func (r *record) summary() summary {
	slices.Sort(r.times)
	slices.SortFunc(r.failures, func(a, b failure) int { return int(a.Ended - b.Ended) })
	told := summary{
		Requests: r.requests, Failed: r.failed, Failures: append([]failure{}, r.failures[:min(len(r.failures), maxFailures)]...),
		Unmarked: r.unmarked, Marked: r.marked,
		Timeline: []*moment{},
	}
	if count := len(r.times); count > 0 {
		told.P50Micros = r.times[count/2].Microseconds()
		told.MaxMicros = r.times[count-1].Microseconds()
	}
	for _, at := range slices.Sorted(maps.Keys(r.buckets)) {
		told.Timeline = append(told.Timeline, r.buckets[at])
	}
	return told
}
