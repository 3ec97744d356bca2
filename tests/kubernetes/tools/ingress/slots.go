package main

import "slices"

// minSlots is how many servers a backend has room for without a reload.
const minSlots = 8

// slots are the servers of HAProxy's configuration, by backend: an endpoint's address, or nothing where one is free.
type slots map[string][]string

// assign gives every endpoint a slot, and leaves those that have one where they are. It says whether there have to be other
// backends or more slots, which takes a reload.
func (s slots) assign(endpoints map[string][]string) bool {
	changed := false
	for name := range s {
		if _, wanted := endpoints[name]; !wanted {
			delete(s, name)
			changed = true
		}
	}
	for name, wanted := range endpoints {
		if s[name] == nil {
			s[name] = make([]string, minSlots)
			changed = true
		}
		for len(s[name]) < len(wanted) {
			s[name] = append(s[name], make([]string, len(s[name]))...)
			changed = true
		}
		place(s[name], wanted)
	}
	return changed
}

func place(servers, wanted []string) {
	for number, address := range servers {
		if !slices.Contains(wanted, address) {
			servers[number] = ""
		}
	}
	for _, address := range wanted {
		if !slices.Contains(servers, address) {
			servers[slices.Index(servers, "")] = address
		}
	}
}
