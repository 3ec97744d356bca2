// Looks names up with Go's own resolver, as a static Go program does: lookup host|srv|txt|ptr NAME.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"sort"
	"time"
)

func main() {
	context, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	found, err := lookup(context, os.Args[1], os.Args[2])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	sort.Strings(found)
	for _, line := range found {
		fmt.Println(line)
	}
}

func lookup(context context.Context, kind, name string) ([]string, error) {
	switch kind {
	case "host":
		return net.DefaultResolver.LookupHost(context, name)
	case "txt":
		return net.DefaultResolver.LookupTXT(context, name)
	case "ptr":
		return net.DefaultResolver.LookupAddr(context, name)
	case "srv":
		_, records, err := net.DefaultResolver.LookupSRV(context, "", "", name)
		var found []string
		for _, record := range records {
			found = append(found, fmt.Sprintf("%d %s", record.Port, record.Target))
		}
		return found, err
	}
	return nil, fmt.Errorf("unknown kind %q", kind)
}
