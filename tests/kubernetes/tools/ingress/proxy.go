package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// patience is how long HAProxy may take to answer on its socket, or to take a configuration.
const patience = 10 * time.Second

// A proxy is the running HAProxy, and what it was told last.
type proxy struct {
	directory string
	port      int
	process   *exec.Cmd
	ended     chan error
	routes    []route
	told      slots
	worker    string
}

func newProxy(directory string, port int) *proxy {
	return &proxy{directory: directory, port: port, ended: make(chan error, 1), told: make(slots)}
}

// follow has HAProxy do as the cluster is now.
func (p *proxy) follow(routes []route, state slots, grown bool) error {
	if p.process == nil || grown || !slices.Equal(routes, p.routes) {
		return p.reload(routes, state)
	}
	var commands []string
	for name, servers := range state {
		for number, address := range servers {
			if p.told[name][number] != address {
				commands = append(commands, change(fmt.Sprintf("%s/s%d", name, number), address)...)
			}
		}
	}
	if len(commands) == 0 {
		return nil
	}
	slices.Sort(commands)
	for _, command := range commands {
		if err := p.command(command); err != nil {
			log.Printf("%s: %v; reloading", command, err)
			return p.reload(routes, state)
		}
	}
	p.remember(routes, state)
	return nil
}

// change leads a server to another address, or takes it out. What it is answering it answers to the end.
func change(server, address string) []string {
	if address == "" {
		return []string{fmt.Sprintf("set server %s state maint", server)}
	}
	host, port, _ := net.SplitHostPort(address)
	// In the order in which they sort.
	return []string{
		fmt.Sprintf("set server %s addr %s port %s", server, host, port),
		fmt.Sprintf("set server %s state ready", server),
	}
}

// reload starts HAProxy, or has it start a new worker beside the old one, which then ends with its last connection.
func (p *proxy) reload(routes []route, state slots) error {
	path := filepath.Join(p.directory, "haproxy.cfg")
	if err := os.WriteFile(path, configuration(p.directory, p.port, routes, state), 0o600); err != nil {
		return err
	}
	p.remember(routes, state)
	if p.process == nil {
		if err := p.start(path); err != nil {
			return err
		}
		return p.await(patience)
	}
	for range 3 {
		if err := p.process.Process.Signal(syscall.SIGUSR2); err != nil {
			return err
		}
		// A master that has only just started a worker may miss the signal.
		if err := p.await(time.Second); err == nil {
			return nil
		}
	}
	return p.await(patience)
}

func (p *proxy) start(configuration string) error {
	p.process = exec.Command("haproxy", "-W", "-db", "-f", configuration)
	p.process.Stdout, p.process.Stderr = os.Stdout, os.Stderr
	if err := p.process.Start(); err != nil {
		return err
	}
	go func() { p.ended <- p.process.Wait() }()
	return nil
}

// await waits for the new worker: what the old one is told from now on would be lost.
func (p *proxy) await(limit time.Duration) error {
	for began := time.Now(); time.Since(began) < limit; time.Sleep(5 * time.Millisecond) {
		worker, err := p.ask("show info")
		if at := strings.Index(worker, "Pid: "); err == nil && at >= 0 {
			if pid := strings.Fields(worker[at:])[1]; pid != p.worker {
				p.worker = pid
				log.Printf("worker %s has the configuration", pid)
				return nil
			}
		}
	}
	return fmt.Errorf("haproxy did not take its configuration within %s", limit)
}

func (p *proxy) remember(routes []route, state slots) {
	p.routes = routes
	p.told = make(slots)
	for name, servers := range state {
		p.told[name] = slices.Clone(servers)
	}
}

// command gives HAProxy one; what went well is answered with nothing, or with what was changed.
func (p *proxy) command(line string) error {
	answer, err := p.ask(line)
	if err == nil && answer != "" && !strings.Contains(answer, "changed") && !strings.Contains(answer, "no need") {
		err = fmt.Errorf("haproxy says %q", answer)
	}
	if err == nil {
		log.Print(line)
	}
	return err
}

// ask returns the answer of HAProxy's socket to a line.
func (p *proxy) ask(line string) (string, error) {
	connection, err := net.DialTimeout("unix", filepath.Join(p.directory, "admin.sock"), patience)
	if err != nil {
		return "", err
	}
	defer connection.Close()
	if err := connection.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(connection, line); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(connection)
	return string(bytes.TrimSpace(answer)), err
}

// end lets HAProxy finish what it is answering, within the grace that its pod has.
func (p *proxy) end() error {
	for _, signal := range []syscall.Signal{syscall.SIGUSR1, syscall.SIGTERM} {
		if err := p.process.Process.Signal(signal); err != nil {
			return err
		}
		select {
		case <-p.ended:
			return nil
		case <-time.After(time.Second):
		}
	}
	return p.process.Process.Kill()
}
