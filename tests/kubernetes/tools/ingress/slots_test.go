package main

import (
	"fmt"
	"slices"
	"testing"
)

func TestEndpointsKeepTheirSlots(t *testing.T) {
	state := make(slots)
	if !state.assign(map[string][]string{"web": {"a", "b", "c"}}) {
		t.Error("a new backend takes a reload")
	}
	b := slices.Index(state["web"], "b")
	if state.assign(map[string][]string{"web": {"b", "d"}}) {
		t.Error("endpoints that come and go take no reload")
	}
	if slices.Index(state["web"], "b") != b || !slices.Contains(state["web"], "d") || slices.Contains(state["web"], "a") {
		t.Errorf("slots are %q", state["web"])
	}
}

func TestMoreEndpointsThanSlotsTakeAReload(t *testing.T) {
	state := make(slots)
	state.assign(map[string][]string{"web": {"a"}})
	var many []string
	for number := range minSlots + 1 {
		many = append(many, fmt.Sprint(number))
	}
	if !state.assign(map[string][]string{"web": many}) || len(state["web"]) != 2*minSlots {
		t.Errorf("slots are %q", state["web"])
	}
	if !state.assign(map[string][]string{}) {
		t.Error("a backend that is gone takes a reload")
	}
}
