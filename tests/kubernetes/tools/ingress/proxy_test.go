package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	networking "k8s.io/api/networking/v1"
)

// A server that answers with its name.
func named(t *testing.T, name string) string {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) }))
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://")
}

func freePort(t *testing.T) int {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}

// Over a connection of its own: one that an earlier worker keeps would be answered by it.
func ask(t *testing.T, port int, host, path string) string {
	request, err := http.NewRequest(http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", port, path), nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Host = host
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d %s", response.StatusCode, body)
}

func TestHAProxyFollowsEndpointsAndRoutes(t *testing.T) {
	if _, err := exec.LookPath("haproxy"); err != nil {
		t.Skip("haproxy is not installed")
	}
	web := backend{"store", "web", networking.ServiceBackendPort{Number: 80}}
	api := backend{"store", "api", networking.ServiceBackendPort{Name: "http"}}
	port := freePort(t)
	proxy := newProxy(t.TempDir(), port)
	state := make(slots)
	follow := func(routes []route, endpoints map[string][]string) {
		t.Helper()
		if err := proxy.follow(routes, state, state.assign(endpoints)); err != nil {
			t.Fatal(err)
		}
	}
	// Four times in a row, soon: a worker that is replaced may accept a last connection yet.
	expect := func(host, path, want string) {
		t.Helper()
		for right, began := 0, time.Now(); right < 4; {
			got := ask(t, port, host, path)
			if strings.HasPrefix(got, want) {
				right++
				continue
			}
			right = 0
			if time.Since(began) > time.Second {
				t.Fatalf("%s%s is answered with %q, not %q", host, path, got, want)
			}
		}
	}
	routes := []route{{"shop.example", "/", false, web}}
	follow(routes, map[string][]string{web.String(): {named(t, "one")}})
	defer func() {
		if err := proxy.end(); err != nil {
			t.Error(err)
		}
	}()
	expect("shop.example", "/", "200 one")
	expect("other.example", "/", "404")
	follow(routes, map[string][]string{web.String(): {named(t, "two")}})
	expect("SHOP.example:80", "/x", "200 two")
	follow(routes, map[string][]string{web.String(): nil})
	expect("shop.example", "/", "503")
	routes = append([]route{{"shop.example", "/api", false, api}}, routes...)
	follow(routes, map[string][]string{web.String(): {named(t, "three")}, api.String(): {named(t, "four")}})
	expect("shop.example", "/", "200 three")
	expect("shop.example", "/api/v2", "200 four")
}

func TestNoRequestFailsAsEndpointsComeAndGo(t *testing.T) {
	if _, err := exec.LookPath("haproxy"); err != nil {
		t.Skip("haproxy is not installed")
	}
	web := backend{"store", "web", networking.ServiceBackendPort{Number: 80}}
	port := freePort(t)
	proxy, state := newProxy(t.TempDir(), port), make(slots)
	routes := []route{{"", "/", false, web}}
	follow := func(addresses ...string) {
		t.Helper()
		if err := proxy.follow(routes, state, state.assign(map[string][]string{web.String(): addresses})); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	a, b := named(t, "a"), named(t, "b")
	leaving := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "c") }))
	c := strings.TrimPrefix(leaving.URL, "http://")
	follow(a, b, c)
	defer func() {
		if err := proxy.end(); err != nil {
			t.Error(err)
		}
	}()
	var group sync.WaitGroup
	var ended atomic.Bool
	for range 4 {
		group.Go(func() {
			// No connection of one client's is another's, and nothing is tried again.
			client := http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}}
			for !ended.Load() {
				response, err := client.Post(fmt.Sprintf("http://127.0.0.1:%d/", port), "text/plain", strings.NewReader("x"))
				if err != nil {
					t.Error(err)
					continue
				}
				if _, err := io.Copy(io.Discard, response.Body); err != nil || response.StatusCode != http.StatusOK {
					t.Errorf("status %d, %v", response.StatusCode, err)
				}
				response.Body.Close()
			}
			client.CloseIdleConnections()
		})
	}
	follow(a, b)
	leaving.Close()
	time.Sleep(100 * time.Millisecond)
	follow(b)
	var many []string
	for number := range 2 * minSlots {
		many = append(many, named(t, fmt.Sprint(number)))
	}
	follow(append(many, b)...)
	follow(a)
	ended.Store(true)
	group.Wait()
}
