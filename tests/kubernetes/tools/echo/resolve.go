package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sort"
	"time"
)

// resolve looks a name up with Go's own resolver, never the C library's, and prints one answer a line, sorted.
func resolve(args []string) error {
	if len(args) == 0 {
		return errors.New("a name is needed")
	}
	kind := "ip"
	if len(args) > 1 {
		kind = args[1]
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	began := time.Now()
	answers, err := lookup(ctx, &net.Resolver{PreferGo: true}, args[0], kind)
	if err != nil {
		return fmt.Errorf("%w (after %d ms)", err, time.Since(began).Milliseconds())
	}
	sort.Strings(answers)
	for _, answer := range answers {
		fmt.Println(answer)
	}
	return nil
}

func lookup(ctx context.Context, resolver *net.Resolver, name, kind string) ([]string, error) {
	switch kind {
	case "ip", "a", "aaaa":
		network := map[string]string{"ip": "ip", "a": "ip4", "aaaa": "ip6"}[kind]
		addresses, err := resolver.LookupIP(ctx, network, name)
		return each(addresses, func(ip net.IP) string { return ip.String() }), err
	case "cname":
		canonical, err := resolver.LookupCNAME(ctx, name)
		return []string{canonical}, err
	case "srv":
		_, targets, err := resolver.LookupSRV(ctx, "", "", name)
		return each(targets, func(t *net.SRV) string {
			return fmt.Sprintf("%d %d %d %s", t.Priority, t.Weight, t.Port, t.Target)
		}), err
	case "txt":
		return resolver.LookupTXT(ctx, name)
	case "mx":
		hosts, err := resolver.LookupMX(ctx, name)
		return each(hosts, func(h *net.MX) string { return fmt.Sprintf("%d %s", h.Pref, h.Host) }), err
	case "ptr":
		return resolver.LookupAddr(ctx, name)
	}
	return nil, fmt.Errorf("unknown kind of record: %s", kind)
}

func each[T any](items []T, show func(T) string) []string {
	var lines []string
	for _, item := range items {
		lines = append(lines, show(item))
	}
	return lines
}
