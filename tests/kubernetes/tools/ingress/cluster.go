package main

import (
	"cmp"
	"fmt"
	"net"
	"slices"
	"strconv"

	core "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	networking "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	networkinglisters "k8s.io/client-go/listers/networking/v1"
)

// What is known of the cluster.
type cluster struct {
	ingresses networkinglisters.IngressLister
	services  corelisters.ServiceLister
	slices    discoverylisters.EndpointSliceLister
}

// A route leads a host and everything below a path to a backend.
type route struct {
	host    string
	path    string
	exact   bool
	backend backend
}

// A backend is one port of a Service.
type backend struct {
	namespace string
	service   string
	port      networking.ServiceBackendPort
}

// String is its name in HAProxy's configuration.
func (b backend) String() string {
	port := b.port.Name
	if port == "" {
		port = strconv.Itoa(int(b.port.Number))
	}
	return fmt.Sprintf("%s_%s_%s", b.namespace, b.service, port)
}

// routes are those of the class, in the order that they are to be tried: exact paths and long ones first.
func (c *cluster) routes(class string) []route {
	all, _ := c.ingresses.List(labels.Everything()) // a cache cannot fail to list everything
	var routes []route
	for _, ingress := range all {
		if name := ingress.Spec.IngressClassName; name == nil || *name != class {
			continue
		}
		for _, rule := range ingress.Spec.Rules {
			if rule.HTTP == nil {
				continue
			}
			for _, path := range rule.HTTP.Paths {
				if service := path.Backend.Service; service != nil {
					exact := path.PathType != nil && *path.PathType == networking.PathTypeExact
					to := backend{ingress.Namespace, service.Name, service.Port}
					routes = append(routes, route{rule.Host, cmp.Or(path.Path, "/"), exact, to})
				}
			}
		}
	}
	slices.SortFunc(routes, func(a, b route) int {
		return cmp.Or(
			cmp.Compare(b.host, a.host), // one without a host comes last
			-compareBool(a.exact, b.exact),
			cmp.Compare(len(b.path), len(a.path)),
			cmp.Compare(a.path, b.path),
			cmp.Compare(a.backend.String(), b.backend.String()),
		)
	})
	return routes
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// endpoints are the addresses behind each backend that take new requests.
func (c *cluster) endpoints(routes []route) map[string][]string {
	endpoints := make(map[string][]string)
	for _, route := range routes {
		name := route.backend.String()
		if _, done := endpoints[name]; !done {
			endpoints[name] = c.behind(route.backend)
		}
	}
	return endpoints
}

func (c *cluster) behind(to backend) []string {
	service, err := c.services.Services(to.namespace).Get(to.service)
	if err != nil {
		return nil
	}
	port, found := portName(service, to.port)
	if !found {
		return nil
	}
	selector := labels.SelectorFromSet(labels.Set{discovery.LabelServiceName: to.service})
	all, _ := c.slices.EndpointSlices(to.namespace).List(selector)
	var ready, leaving []string
	for _, slice := range all {
		if len(service.Spec.IPFamilies) > 0 && string(slice.AddressType) != string(service.Spec.IPFamilies[0]) {
			continue
		}
		number := portNumber(slice, port)
		for _, endpoint := range slice.Endpoints {
			address := net.JoinHostPort(endpoint.Addresses[0], strconv.Itoa(int(number)))
			switch {
			case number == 0:
			case is(endpoint.Conditions.Ready, true):
				ready = append(ready, address)
			case is(endpoint.Conditions.Serving, false) && is(endpoint.Conditions.Terminating, false):
				leaving = append(leaving, address)
			}
		}
	}
	// As kube-proxy has it: those that are leaving serve as long as there is nobody else.
	if len(ready) == 0 {
		ready = leaving
	}
	slices.Sort(ready)
	return slices.Compact(ready)
}

func is(condition *bool, unknown bool) bool {
	if condition == nil {
		return unknown
	}
	return *condition
}

func portName(service *core.Service, wanted networking.ServiceBackendPort) (string, bool) {
	for _, port := range service.Spec.Ports {
		if (wanted.Name != "" && port.Name == wanted.Name) || (wanted.Name == "" && port.Port == wanted.Number) {
			return port.Name, true
		}
	}
	return "", false
}

// portNumber is that of the endpoints, zero if the slice does not have the port.
func portNumber(slice *discovery.EndpointSlice, name string) int32 {
	for _, port := range slice.Ports {
		if port.Name != nil && *port.Name == name && port.Port != nil {
			return *port.Port
		}
	}
	return 0
}
